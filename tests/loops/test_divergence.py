"""Divergence over particles: a bound of KL(particles‖π_θ) from below, against closed forms, and when it speaks up."""

import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import DivergenceError, InvalidInputError
from implicit_diffusion.loops import NestedParticles, Single
from implicit_diffusion.loops.diagnostics import advice
from implicit_diffusion.loops.diagnostics.divergence import distance, diverged, limit
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import GaussianMixture, Tilted, mlp
from implicit_diffusion.runs.callbacks.watch import Watch
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.samplers import HMC, ULA
from tests.helpers.gibbs_loops import BUILDS, F64, build
from tests.helpers.oracles_gibbs import Harmonic


class Away(nn.Module):
    """e^{−V(x)} = (e^{−‖x‖²/2} + e^{depth − ‖x − far‖²/2}) e^{shift}: all but e^{−depth} of the law is far away."""

    def __init__(self, depth, far=12.0, shift=0.0, unit=1.0):
        super().__init__()
        self.depth, self.far, self.shift, self.unit = depth, far, shift, unit
        self.theta = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x):
        z = x / self.unit
        away = self.depth - (z - self.far / math.sqrt(x.shape[1])).square().sum(1) / 2
        return -torch.logaddexp(-z.square().sum(1) / 2, away) - self.shift + self.theta * z[:, 0]


def still(potential, x, objective=None, kernel=None, **options):
    """A loop whose θ does not move."""
    sgd = torch.optim.SGD(potential.parameters(), lr=0.0)
    objective = Reward(lambda x: x[:, 0]) if objective is None else objective
    return Single(potential, kernel or HMC(0.1, 1), objective, sgd, particles=x, noise=Noise(0), **options)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("d", [1, 3, 20])
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (3.0, 1.0), (0.0, 0.3), (1.0, 2.0)])
def test_the_distance_of_gaussians_is_their_kl(mean, scale, d):
    """Both bounds are tight there: KL = d (m² + s² − 1 − log s²)/2, but for q, which knows particles only."""
    kl = d * (mean**2 + scale**2 - 1 - 2 * math.log(scale)) / 2
    found = distance(still(Harmonic(), mean + scale * normal(4000, d)))
    noise = 4 * math.sqrt(d * (mean**2 * scale**2 + scale**4 / 2 + 1) / 4000)
    assert found < kl + noise + 3  # chance: e^{−3}, and the noise of the particles
    if d < 20 or mean == 0:  # elsewhere few of the points lie where the law is
        assert found > kl - noise - 0.7


@pytest.mark.parametrize("d", [1, 2])
def test_it_sees_what_no_particle_has_seen_in_any_units(d):
    """Particles are draws of the near mode, of mass e^{−50}: a KL of 50, whatever the units and the constant in V."""
    x, found = normal(2000, d), []
    for unit, shift in ((1.0, 0.0), (1.0, 700.0), (1e-3, 0.0), (1e3, -5.0)):
        loop = still(Away(50.0, shift=shift, unit=unit), unit * x, kernel=HMC(0.1 * unit, 1))
        found.append(distance(loop))
    assert 47 < found[0] < 53
    assert found == pytest.approx([found[0]] * 4, abs=1e-6)
    assert distance(still(Away(-50.0), x)) < 0.5


def test_masses_of_modes_that_are_off_are_no_divergence():
    """Shares (½, ½) under (0.999, 0.001): KL 2.8, and the bound is below it."""
    shares = torch.tensor([0.999, 0.001], dtype=F64)
    potential = GaussianMixture(torch.tensor([[-4.0], [4.0]], dtype=F64), shares.log())
    x = normal(2000, 1) + 4 * torch.tensor([-1.0, 1.0], dtype=F64).repeat(1000)[:, None]
    kl = (0.5 * (0.5 / shares).log()).sum().item()
    assert distance(still(potential, x)) < kl + 0.2 and diverged(still(potential, x)) is None


def test_contrastive_divergence_is_blind_to_it_and_the_bound_is_not():
    """Particles begin at data every time: neither their place nor their energy tells that π_θ is elsewhere."""
    data = normal(400, 2)
    potential = Away(50.0)
    sgd = torch.optim.SGD(potential.parameters(), lr=0.0)
    objective = ForwardKL(data, batch=100)
    options = {"particles": data[:100], "noise": Noise(0), "inner_steps": 3, "begin": "data"}
    loop = NestedParticles(potential, ULA(0.01), objective, sgd, **options)
    metrics = loop.step()
    assert diverged(loop, nats=0.0) is None
    (said,) = [line for line in advice(loop, metrics) if "nats" in line]
    assert "V is low where none of them are" in said and "smaller learning rate" in said
    assert 45 < distance(loop) < 55 and limit(loop) == 12


def contrastive(lr, steps=1, seed=0, dtype=torch.float32):
    data = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]])).sample(500, Noise(1)).to(dtype)
    V = Tilted(mlp(2, Noise(seed), width=32), (2,)).to(dtype)
    adam = torch.optim.Adam(V.parameters(), lr=lr)
    options = {"particles": 128, "noise": Noise(seed), "inner_steps": steps, "begin": "data"}
    return NestedParticles(V, ULA(0.01), ForwardKL(data, batch=128), adam, **options)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_contrastive_divergence_at_too_large_a_rate_is_said_while_training_and_by_advice(seed, steps, dtype):
    """By whichever sign comes first: the training is chaotic, so that rounding decides. Each has a test below."""
    loop, said, last = contrastive(1.0, steps, seed, dtype), [], {}
    with pytest.raises(DivergenceError, match=r"update \d+: .* smaller learning rate"):
        fit(loop, 200, callbacks=[lambda f: last.update(f.metrics), Watch(say=said.append)])
    assert loop.update.updates < 100 and "The run stops if this is still so at the next check" in said[0]
    assert "smaller learning rate" in advice(loop, last)[0]


def test_particles_that_have_left_the_data_are_counted():
    """More than one in a hundred; the data are within 6 of the origin."""
    loop = contrastive(1e-3)
    x = loop.particles.x.clone()
    x[0] = 100.0
    loop.refresh(Particles(x))
    assert "as far out" not in (diverged(loop) or "")
    x[:3] = 100.0
    loop.refresh(Particles(x))
    said = diverged(loop)
    assert said.startswith("3 of 128 particles are more than ten times as far out") and "smaller learning rate" in said


def test_units_that_have_died_are_noticed_though_the_gradient_is_not_zero():
    """V is that of the Gaussian, and particles stay at the data: all is calm, and nothing is learnt."""
    loop, said, norms = contrastive(1e-9), [], []
    *hidden, last = [layer for layer in loop.model.modules() if isinstance(layer, nn.Linear)]
    nn.init.ones_(last.weight)
    for layer in hidden:
        nn.init.constant_(layer.bias, -20.0)
    with pytest.raises(DivergenceError, match=r"V hardly depends on θ at the data: .* smaller learning rate"):
        fit(loop, 50, callbacks=[lambda f: norms.append(f.metrics["grad_norm"]), Watch(say=said.append)])
    assert loop.update.updates == 40 and "units of a network have died" in said[0] and min(norms) > 0


def test_a_gradient_of_exactly_zero_is_noticed():
    assert "Γ is exactly zero" in diverged(contrastive(1e-3), {"grad_norm": 0.0})


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("power", [-1, 1])
def test_parameters_of_any_size_are_alive(size, power):
    """V = (x/size)²/2 and a term in a θ that begins at its optimum, which is zero, as a place or as a slope."""

    class Begun(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(2, dtype=F64))

        def forward(self, x):
            return (x / size - self.theta * size**power).square().sum(1) / 2

    data, potential, said = size * normal(400, 2), Begun(), []
    sgd = torch.optim.SGD(potential.parameters(), lr=1e-2 / size ** (2 * power))
    options = {"particles": data[:100], "noise": Noise(0), "inner_steps": 3, "begin": "data"}
    loop = NestedParticles(potential, ULA(0.01 * size**2), ForwardKL(data, batch=100), sgd, **options)
    fit(loop, 60, callbacks=[Watch(say=said.append)])
    assert said == []


def test_contrastive_divergence_at_a_good_rate_is_let_pass():
    sound, said = contrastive(1e-3, 3), []
    fit(sound, 100, callbacks=[Watch(every=5, say=said.append)])
    assert said == [] and diverged(sound) is None


def test_particles_that_run_off_for_a_reward():
    """No data here: V = −θ x² with θ raised by the reward beyond the Gaussian; their own spread tells."""

    class Saddle(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.4, dtype=F64))

        def forward(self, x):
            return (0.5 - self.theta) * x.square().sum(1)

    potential = Saddle()
    sgd = torch.optim.SGD(potential.parameters(), lr=0.02)
    objective = Reward(lambda x: x.square().sum(1).clamp(max=100))
    loop = Single(potential, ULA(0.1), objective, sgd, particles=normal(200, 2), noise=Noise(0))
    with pytest.raises(DivergenceError, match=r"nats from the law of V.*weight decay"):
        fit(loop, 400, callbacks=[Watch(every=5, say=lambda line: None)])


@pytest.mark.parametrize("name", BUILDS)
def test_sound_loops_are_sound(name):
    said = []
    loop = build(name)
    fit(loop, 40, callbacks=[Watch(every=2, say=said.append)])
    assert said == [] and diverged(loop) is None and distance(loop) < 2


def test_particles_that_come_nearer_are_let_pass():
    """A start at 30 deviations is 450 nats away, and no divergence: a Gaussian is reached in a few dozen steps."""
    loop, said = still(Harmonic(), 30 + normal(200, 1), kernel=ULA(0.05)), []
    fit(loop, 80, callbacks=[Watch(every=5, say=said.append)])
    assert said == [] and distance(loop) < 2
    under_way = still(Harmonic(), 30 + normal(200, 1), kernel=ULA(0.05))
    fit(under_way, 20, callbacks=[Watch(every=5, say=said.append)])  # ends at a look, well above the limit
    assert said == [] and distance(under_way) > 3 * limit(under_way)
    stands = still(Harmonic(), 30 + normal(200, 1), kernel=ULA(1e-9))
    with pytest.raises(DivergenceError, match="nats"):
        fit(stands, 80, callbacks=[Watch(every=5, say=said.append)])


def test_looking_changes_nothing_and_says_nothing_where_it_knows_nothing():
    watched, alone = build("weighted hmc, falling step"), build("weighted hmc, falling step")
    fit(watched, 12, callbacks=[Watch(every=1)])
    for _ in range(12):
        alone.step()
    assert all(torch.equal(a, b) for a, b in zip(watched.model.parameters(), alone.model.parameters()))
    assert torch.equal(watched.weighted_state.x, alone.weighted_state.x)
    assert watched.gradient_evaluations == alone.gradient_evaluations
    assert distance(watched) == distance(watched)
    assert distance(still(Harmonic(), 100 + normal(15, 1))) == -math.inf
    assert distance(still(Harmonic(), torch.ones(40, 2, dtype=F64))) == -math.inf


def test_watch_needs_particles():
    from tests.runs.test_fit import build as over_a_chain

    with pytest.raises(InvalidInputError, match="over chains use Runaway"):
        fit(over_a_chain()[0], 2, callbacks=[Watch(every=1)])
