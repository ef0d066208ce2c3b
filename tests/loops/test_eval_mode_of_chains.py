"""A chain's networks are functions: u_θ and u_0 in evaluation mode wherever a chain runs, in their own after."""

import copy

import pytest
import torch
from torch import nn

from implicit_diffusion.evaluation import effect_of_clipping, evaluate
from implicit_diffusion.gradients import FullBackprop
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.oracles import affine_chain
from tests.loops.test_eval_mode import untouched

N = 3


class Moody(nn.Module):
    """A denoiser that would be random and have a memory in training mode."""

    def __init__(self, seed):
        super().__init__()
        self.inner = copy.deepcopy(affine_chain(N, 2, seed=seed)[0].denoiser)
        self.norm, self.drop = nn.BatchNorm1d(2, dtype=torch.float64), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.drop(self.norm(self.inner(x, t)))


class Step:
    """A scheduler that does nothing, to put a chain's predictions through."""

    timesteps = range(N)

    def set_timesteps(self, num_steps): ...

    def step(self, u, t, x, generator):
        return type("Output", (), {"prev_sample": x + u})


def chain_of(net, reference):
    return Chain(net, affine_chain(N, 2)[0].table, (2,), reference=reference, pretrained_rows=[1])


def reward(x):
    return x.sin().sum(1)


def loop(kind, **options):
    def act(chain):
        sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=1e-3)
        made = kind(chain, Reward(reward) + 0.5 * PathKL(), sgd, batch=4, noise=Noise(0), **options)
        predict_memory(made)
        for _ in range(2 * N):
            made.step()

    return act


ACTS = {
    "sample": lambda chain: chain.sample(Noise(0), 4),
    "trajectory": lambda chain: chain.trajectory(Noise(0), 4),
    "evaluate": lambda chain: evaluate(chain, reward, Noise(0), starts=4, repeats=2),
    "clipping": lambda chain: effect_of_clipping(chain, Step(), reward, Noise(0), {}),
    "nested": loop(Nested),
    "backpropagation": loop(Nested, estimator=FullBackprop()),
    "queue": loop(Queue),
    "queue, stride 2": loop(Queue, stride=2),
}


@pytest.mark.parametrize("which", ["denoiser", "reference"])
@pytest.mark.parametrize("name", ACTS)
def test_networks_of_chains_are_functions(name, which):
    nets = {"denoiser": Moody(0), "reference": Moody(1)}
    chain = chain_of(nets["denoiser"], nets["reference"])
    assert untouched(nets[which], lambda: ACTS[name](chain))
