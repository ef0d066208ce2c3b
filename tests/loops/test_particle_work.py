"""Work is counted by the loop that does it: as many pulls through V as there were, and none of anybody else's."""

import pytest
import torch

from implicit_diffusion.loops import NestedParticles, Single
from implicit_diffusion.loops.diagnostics import advice, signal_to_noise, statistics
from implicit_diffusion.loops.diagnostics.divergence import distance, diverged
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped, annealed, simulate, warm_up
from tests.helpers.gibbs_loops import BUILDS, F64, build, wave
from tests.helpers.oracles_gibbs import Banana

DATA = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


class Pull(torch.autograd.Function):
    """The identity, which counts how often gradients come back through it."""

    @staticmethod
    def forward(ctx, values, pulls):
        ctx.pulls = pulls
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        ctx.pulls.append(1)
        return gradient, None


class Counted(Banana):
    def __init__(self):
        super().__init__()
        self.pulls = []

    def forward(self, x):
        return Pull.apply(super().forward(x), self.pulls)


LOOPS = {
    "ula": (Single, ULA(0.1), {}),
    "ula, weighted": (Single, ULA(0.1), {"weighted": True}),
    "ula, lag": (Single, ULA(0.1), {"lag": True}),
    "mala": (Single, MALA(0.1), {}),
    "hmc, weighted": (Single, HMC(0.1, 3), {"weighted": True}),
    "underdamped": (Single, Underdamped(0.1), {}),
    "x-first": (Single, ULA(0.1), {"order": "x-first"}),
    "x-first, weighted mala": (Single, MALA(0.1), {"order": "x-first", "weighted": True}),
    "several": (Single, ULA(0.1), {"iterations": 3}),
    "nested": (NestedParticles, ULA(0.1), {"inner_steps": 4}),
    "nested hmc from data": (NestedParticles, HMC(0.1, 2), {"inner_steps": 2, "begin": "data"}),
}


@pytest.mark.parametrize("objective", ["likelihood", "both"])
@pytest.mark.parametrize("name", LOOPS)
def test_what_is_counted_is_what_was_pulled(name, objective):
    """One pull serves sampler and Γ where maximum likelihood is the only term and there are no weights.

    The nested loop has no use for ∇V at its last particles, which the fused pass may compute: it is not charged for it.
    """
    kind, kernel, settings = LOOPS[name]
    potential, terms = Counted(), ForwardKL(DATA) if objective == "likelihood" else ForwardKL(DATA) + Reward(wave)
    sgd = torch.optim.SGD(potential.parameters(), lr=0.01)
    loop = kind(potential, kernel, terms, sgd, particles=DATA, noise=Noise(0), **settings)
    potential.pulls.clear()
    for _ in range(3):
        metrics = loop.step()
    unused = 3 * (kind is NestedParticles and objective == "both")
    assert loop.gradient_evaluations == metrics["gradient_evaluations"] == len(potential.pulls) - unused


@pytest.mark.parametrize("name", BUILDS)
def test_looking_and_other_loops_leave_the_count_and_the_run_alone(name):
    """Diagnostics, plain sampling, warm-up, annealing and a second loop, with the same kernel and the same V."""
    loop, alone = build(name), build(name)
    for _ in range(3):
        metrics = loop.step()
        alone.step()
    before, kernel, potential = loop.gradient_evaluations, loop.kernel, loop.model
    signal_to_noise(loop), statistics(loop), distance(loop), diverged(loop, metrics), advice(loop, metrics)
    assert len(loop.particles) == 64
    x = loop.weighted_state.x.clone()
    list(simulate(kernel, potential, x, Noise(1), 2))
    if kernel.target_acceptance is not None and not callable(kernel.step_size):
        warm_up(kernel, potential, x, Noise(2), steps=20)
    if kernel.weighted:
        replicas = annealed(lambda t: gaussian(), kernel, 16, Noise(3), steps=2)
        assert replicas.gradient_evaluations == 2 * kernel.evaluations_per_step
    frozen = torch.optim.SGD(potential.parameters(), lr=1e-30)  # leaves θ as it is
    second = Single(potential, kernel, Reward(wave), frozen, particles=x, noise=Noise(4))
    second.step()
    assert second.gradient_evaluations == kernel.evaluations_per_step + 1
    assert loop.gradient_evaluations == before == loop.cost()["gradient_evaluations"]
    ends = [one.step() for one in (loop, alone)]
    assert ends[0].keys() == ends[1].keys() and all(ends[0][key] == ends[1][key] for key in ends[0])
    assert torch.equal(loop.weighted_state.x, alone.weighted_state.x)


def gaussian():
    return GaussianMixture(torch.zeros(1, 2, dtype=F64))


def test_particles_that_replace_the_loops_own_bring_their_work():
    loop = build("weighted mala")
    loop.step()
    before = loop.gradient_evaluations
    loop.refresh(loop.particles)
    assert loop.gradient_evaluations == before
    loop.refresh(loop.particles, gradient_evaluations=50)
    assert loop.gradient_evaluations == before + 50
    assert loop.step()["gradient_evaluations"] == before + 50 + 3
