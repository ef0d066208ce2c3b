"""Loops over an affine chain, nested and queued, and what their optimizer was given."""

import torch

from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers.oracles import affine_chain

BETA, N = 0.5, 6
LOOPS = {
    "nested": Nested,
    "queue": Queue,
    "queue, stride 4": lambda *a, **k: Queue(*a, stride=4, **k),
    "queue, stride N": lambda *a, **k: Queue(*a, stride=N, **k),
}


def build(kind, lr=1e-2, batch=4, beta=BETA, seed=0, pretrained_rows=(5,), optimizer=torch.optim.Adam, **update):
    chain, reward = affine_chain(N, 2, pretrained_rows=pretrained_rows)
    opt = optimizer(chain.denoiser.parameters(), lr=lr)
    loop = LOOPS[kind](chain, Reward(reward) + beta * PathKL(), Update(opt, **update), batch=batch, noise=Noise(seed))
    return loop, reward


def weights(loop):
    return torch.cat([p.detach().flatten().clone() for p in loop.chain.denoiser.parameters()])


class Recorder(torch.optim.SGD):
    """Plain SGD that remembers θ before, and Γ of, every update."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.history, self.gradients = [], []

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.history.append([p.detach().clone() for p in parameters])
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
        super().step()


def nested_gradient(loop, index):
    for p in loop.chain.denoiser.parameters():
        p.grad = None
    Adjoint()(loop.chain, loop.objective, loop.noise, loop.batch, index)
    return [p.grad.clone() for p in loop.chain.denoiser.parameters()]
