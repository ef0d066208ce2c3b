"""Networks inside objectives are deterministic functions: no buffer and no global generator moves, modes come back."""

import pytest
import torch
from torch import nn

from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.gradients import FullBackprop
from implicit_diffusion.loops import Nested, NestedParticles, Queue, Single, Unrolled
from implicit_diffusion.loops.diagnostics import signal_to_noise
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, ForwardKL, Functional, ReverseKL, Reward
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles import affine_chain
from tests.helpers.oracles_gibbs import Harmonic

F64 = torch.float64
X = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3


class Score(nn.Module):
    """A network that would be random and have a memory in training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(2, dtype=F64), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(x)).sin().sum(1)

    def mean(self, x, w):
        return w @ self(x)

    def gram(self, x, y):
        return self(x)[:, None] * self(y)


OBJECTIVES = {
    "reward": lambda net: Reward(net),
    "its method": lambda net: Reward(net.forward),
    "functional": lambda net: Functional(net.mean),
    "kernel": lambda net: MMD(X[:5], net.gram),
    "U": lambda net: ReverseKL(net) + Reward(lambda x: x.sum(1)),
}


def on_chain(kind, **options):
    def run(objective):
        chain, _ = affine_chain(2, 2)
        loop = kind(chain, objective, torch.optim.SGD(chain.denoiser.parameters()), batch=4, noise=Noise(0), **options)
        predict_memory(loop)
        for _ in range(3):
            loop.step()

    return run


def on_particles(kind, **options):
    def run(objective):
        v = Harmonic().double()
        sgd = torch.optim.SGD(v.parameters(), lr=0.01)
        loop = kind(v, ULA(0.1), objective, sgd, particles=X, noise=Noise(0), **options)
        loop.step()
        signal_to_noise(loop, groups=2)

    return run


RUNS = {
    "nested": on_chain(Nested),
    "backpropagation": on_chain(Nested, estimator=FullBackprop()),
    "queue": on_chain(Queue),
    "single": on_particles(Single),
    "x-first": on_particles(Single, order="x-first", weighted=True),
    "nested particles": on_particles(NestedParticles, inner_steps=2),
    "unrolled": on_particles(Unrolled, unrolled_steps=2),
}


def untouched(net, act):
    """Whether `act` leaves buffers, modes and the global generator as they are."""
    buffers, state = [b.clone() for b in net.buffers()], torch.get_rng_state()
    act()
    same = all(torch.equal(a, b) for a, b in zip(buffers, net.buffers()))
    return same and torch.equal(state, torch.get_rng_state()) and all(part.training for part in net.modules())


@pytest.mark.parametrize(
    ("run", "objective"),
    [*((run, "reward") for run in RUNS)]
    + [(run, o) for run in ("queue", "single") for o in ("its method", "functional", "kernel")]
    + [("single", "U")],
)
def test_loops_leave_the_networks_of_objectives_alone(run, objective):
    net = Score()
    assert untouched(net, lambda: RUNS[run](OBJECTIVES[objective](net)))


def test_evaluations_repeat():
    net, (chain, _) = Score(), affine_chain(2, 2)
    found = []
    assert untouched(net, lambda: found.extend(evaluate(chain, net, Noise(1), starts=8).reward for _ in range(2)))
    assert torch.equal(*found)


def test_the_start_of_a_tilted_gaussian_is_told_in_eval_mode():
    class Zero(Score):
        def forward(self, x):
            return 0 * super().forward(x)

    net = Zero()
    tilted = Tilted(net, (2,))
    adam = torch.optim.Adam(tilted.parameters())

    def build():
        assert tilted.log_z > 0
        Single(tilted, ULA(0.1), ForwardKL(X), adam, particles=6, noise=Noise(0), weighted=True)

    assert untouched(net, build)
