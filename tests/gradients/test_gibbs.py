"""Γ under a stationary law against finite differences of ℓ(θ) by quadrature, judged by z-scores.

A test passes where every component is within 4 standard errors of the truth *and* the standard error along the
gradient is below half a percent, so that an error of 2 % would have shown. Mutations in the source must make it fail.

Where F′ itself depends on the particles (MMD, Sinkhorn) the estimate is that much noisier. There the noise is lowered
by a control variate whose mean is ∇ℓ exactly: the plain covariance, with n − 1, of the population's F′ and ∇_θ V.
"""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Gibbs, gibbs
from implicit_diffusion.gradients.fused import fused_pass
from implicit_diffusion.objectives import Density, FirstVariation, ForwardKL
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import energy_of
from tests.gradients.gibbs_cases import CASES, GRIDS, POTENTIALS, THETA, THETA_0, exact_gradient
from tests.helpers.oracles_gibbs import estimate, z_scores

NAMES = list(CASES[1])
SIZES = {"mmd": (600, 80), "sinkhorn": (128, 150)}  # particles, batches; many of both elsewhere
exact = cache(exact_gradient)


def jacobian(potential, x):
    """∇_θ V at every particle, in closed form."""
    columns = [-x[:, 0], x[:, 0] ** 2 / 2]
    if x.shape[1] == 2:
        columns.append(-(x[:, 1] - potential.theta[2].detach() * x[:, 0] ** 2 / 2) * x[:, 0] ** 2 / 2)
    return torch.stack(columns, 1)


def batches(dim, name, weighted, n=None, count=None, seed=0):
    """Γ of many independent batches, with shape (batches, parameters)."""
    potential, start = POTENTIALS[dim](THETA[dim]), POTENTIALS[dim](THETA_0[dim] if weighted else THETA[dim])
    size = SIZES.get(name, (10_000, 64))
    n, count = n or size[0], count or size[1]
    case, generator = CASES[dim][name], torch.Generator().manual_seed(seed)
    grid, truth = GRIDS[dim](0.1 if dim == 1 else 0.4), exact(dim, name)
    p, rows = grid.law(potential)[0], []
    for _ in range(count):
        x = start.draw(n, generator)
        logs = start(x).detach() - potential(x).detach() if weighted else None
        row = estimate(potential, case.objective, x, logs)
        if name in SIZES and n > 8:  # their bias in 1/n is taken off by halving n
            parts = zip(x.chunk(2), [None, None] if logs is None else logs.chunk(2), strict=True)
            row = 2 * row - sum(estimate(potential, case.objective, *part) for part in parts) / 2
        if case.variation is not None:
            row = row - covariate(case.variation(x, grid, p), jacobian(potential, x), logs) + truth
        rows.append(row)
    return torch.stack(rows)


def covariate(variation, slopes, logs):
    """−Cov(F′, ∇V), of mean ∇ℓ; with importance weights normalised by the batch, up to O(1/n)."""
    w = torch.full_like(variation, 1 / len(variation)) if logs is None else logs.softmax(0)
    return -(w * (variation - w @ variation)) @ slopes / (1 - w.square().sum())


def judge(rows, truth):
    """The largest |z|, and relative error and its standard error along the true gradient."""
    along = rows @ truth / truth.square().sum()
    return z_scores(rows, truth).abs().max(), (along.mean() - 1).item(), (along.std() / math.sqrt(len(along))).item()


SLOW = [pytest.param(name, marks=pytest.mark.slow) if name in SIZES else name for name in NAMES]


@pytest.mark.parametrize(
    ("dim", "weighted"),
    [
        pytest.param(1, False, id="1-iid"),
        pytest.param(2, True, id="2-weighted"),
        pytest.param(1, True, id="1-weighted", marks=pytest.mark.slow),
        pytest.param(2, False, id="2-iid", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", SLOW)
def test_against_finite_differences_of_quadrature(name, dim, weighted):
    worst, error, standard = judge(batches(dim, name, weighted), exact(dim, name))
    assert standard <= 0.005, "too few samples to see an error of 2 %"
    assert worst < 4 and abs(error) < 4 * standard


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "reverse_kl"])
@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eight_particles_are_unbiased(name, dim):
    """The factor n/(n − 1): without it eight particles would be off by 12.5 %."""
    worst, error, standard = judge(batches(dim, name, False, n=8, count=1200), exact(dim, name))
    assert standard < 0.125 / 4
    assert worst < 4 and abs(error) < 4 * standard


def without_factor(values, particles):
    w = particles.weights
    return w * (values - w @ values)


MUTATIONS = {
    "sign": lambda values, particles, right: -right(values, particles),
    "factor two": lambda values, particles, right: 2 * right(values, particles),
    "two percent": lambda values, particles, right: 1.02 * right(values, particles),
    "not centred": lambda values, particles, right: particles.weights * (values + 1),  # F′ has a free constant
    "weights forgotten": lambda values, particles, right: right(values, Particles(particles.x)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize(
    "name", ["reward", *(pytest.param(n, marks=pytest.mark.slow) for n in ("reverse_kl", "functional", "mmd"))]
)
def test_mutations_are_seen(name, mutation, monkeypatch):
    weighted = mutation == "weights forgotten"
    right, mutant = gibbs.unbiased_centred, MUTATIONS[mutation]
    monkeypatch.setattr(gibbs, "unbiased_centred", lambda values, particles: mutant(values, particles, right))
    worst, error, standard = judge(batches(1, name, weighted), exact(1, name))
    assert worst > 4 or abs(error) > 4 * standard


@pytest.mark.slow
def test_mutations_of_sinkhorn_are_seen(monkeypatch):
    """Fewer batches than above: dropped self-terms and a sign are gross."""
    case, right = CASES[1]["sinkhorn"].objective, gibbs.unbiased_centred
    monkeypatch.setattr(gibbs, "unbiased_centred", lambda values, particles: -right(values, particles))
    worst, error, standard = judge(batches(1, "sinkhorn", False, count=10), exact(1, "sinkhorn"))
    assert abs(error) > 4 * standard and worst > 4
    monkeypatch.setattr(gibbs, "unbiased_centred", right)
    monkeypatch.setattr(type(case), "_self", lambda self, w, cost: torch.zeros_like(w))
    worst, error, standard = judge(batches(1, "sinkhorn", False, count=10), exact(1, "sinkhorn"))
    assert abs(error) > 4 * standard


@pytest.mark.parametrize("flip", [-1.0, 0.5, 1.02])
def test_mutations_of_the_measure_on_data_are_seen(flip, monkeypatch):
    """The particles carry its total."""
    right = ForwardKL.first_variation

    def mutant(self, particles, density):
        variation = right(self, particles, density)
        return replace(variation, total_on_points=flip * variation.total_on_points)

    monkeypatch.setattr(ForwardKL, "first_variation", mutant)
    worst, error, standard = judge(batches(1, "forward_kl", False), exact(1, "forward_kl"))
    assert worst > 4 or abs(error) > 4 * standard


@pytest.mark.slow
def test_the_factor_is_seen_with_eight_particles(monkeypatch):
    monkeypatch.setattr(gibbs, "unbiased_centred", without_factor)
    for name in ("reward", "reverse_kl"):
        worst, error, standard = judge(batches(1, name, False, n=8, count=1200), exact(1, name))
        assert abs(error) > 4 * standard or worst > 4


@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mmd"])
def test_grid_points_as_weighted_particles_give_the_gradient_itself(name, dim):
    """With the grid's points as particles and −V as log-weights nothing is random: Γ(1 − Σw²) is ∇ℓ to six digits.

    (MMD leaves out the pairs of a point with itself, which weigh too much on a grid.)
    """
    potential, grid = POTENTIALS[dim](THETA[dim]), GRIDS[dim]() if dim == 1 else GRIDS[2](0.4)
    logs = -potential(grid.points).detach()
    kept = logs.softmax(0) > 1e-12
    x, logs = grid.points[kept], logs[kept]
    terms = CASES[dim][name].objective.stationary
    total = torch.zeros_like(potential.theta)
    for c, term in terms:
        factor = 1 if isinstance(term, ForwardKL) else 1 - logs.softmax(0).square().sum()
        total = total + c * factor * estimate(potential, term, x, logs)
    torch.testing.assert_close(total.detach(), exact(dim, name).detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_one_pass_equals_separate_passes(name, weighted):
    """V, ∇V and Γ by themselves, as one would write them from the paper."""
    potential, generator = POTENTIALS[2](THETA[2]), torch.Generator().manual_seed(0)
    x, logs = potential.draw(50, generator), torch.randn(50, generator=generator, dtype=torch.float64)
    terms = CASES[2][name].objective.stationary
    points, weigh = [term.draw(generator) for _, term in terms], (lambda here: Particles(x, logs)) if weighted else None
    fused = fused_pass(potential, [potential.theta], terms, x, points, weigh)
    alone = energy_of(potential, x)
    torch.testing.assert_close(fused.here.value, alone.value, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(fused.here.grad, alone.grad, rtol=1e-12, atol=1e-13)
    particles, total, charge = Particles(x, logs if weighted else None), 0.0, 0.0
    for (c, term), y in zip(terms, points, strict=True):
        at_points = None if y is None else potential(y).detach()
        measure = Gibbs()(term.first_variation(particles, Density(alone.value, y, at_points)), particles)
        total = total + c * (measure.on_particles @ potential(x))
        charge = charge + c * measure.on_particles
        if y is not None:
            total = total + c * (measure.on_points @ potential(y))
    (expected,) = torch.autograd.grad(total, [potential.theta])
    torch.testing.assert_close(fused.gradients[0], expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(fused.charges, charge)
    assert not any(t.requires_grad for t in (*fused.here, *fused.gradients, fused.charges, *fused.values.values()))


@pytest.mark.parametrize("event", [(1,), (3,), (2, 2)])
def test_one_pull_for_maximum_likelihood_equals_the_general_path(event):
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(event), 8), nn.Tanh(), nn.Linear(8, 1)).double()
            for i, p in enumerate(self.net.parameters()):
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

        def forward(self, x):
            return self.net(x)[:, 0] + x.flatten(1).square().sum(1) / 2

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, *event, generator=generator, dtype=torch.float64) for n in (20, 7))
    potential, parameters = Net(), None
    parameters = list(potential.parameters())
    for terms in ([(0.7, ForwardKL(y))], [(0.7, ForwardKL(y)), (0.4, ForwardKL(2 * y, name="other"))]):
        points = [term.draw(generator) for _, term in terms]
        one = fused_pass(potential, parameters, terms, x, points)
        general = fused_pass(potential, parameters, terms, x, points, lambda here: Particles(x))
        for a, b in zip((*one.here, *one.gradients, one.charges), (*general.here, *general.gradients, general.charges)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    cancelling = [(1.0, ForwardKL(y)), (-1.0, ForwardKL(2 * y, name="other"))]  # the particles carry no charge
    fused = fused_pass(potential, parameters, cancelling, x, [y, 2 * y])
    torch.testing.assert_close(fused.here.grad, energy_of(potential, x).grad)


def test_a_measure_on_points_that_nobody_drew_is_refused():
    class Half(ForwardKL):
        def draw(self, generator):
            return None

        def first_variation(self, particles, density):
            return FirstVariation(on_points=torch.full((3,), -1 / 3, dtype=torch.float64))

    potential = POTENTIALS[1](THETA[1])
    x = torch.zeros(4, 1, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match="nll has a measure on points: its `draw` must return them"):
        fused_pass(potential, [potential.theta], [(1.0, Half(x))], x, [None])


@pytest.mark.parametrize("declared", ["points", "particles"])
def test_a_measure_that_lies_elsewhere_than_declared_is_refused(declared):
    """It would be divided by charges that differ, or left out by a solver on the particles."""

    class Both(ForwardKL):
        support = declared

        def first_variation(self, particles, density):
            return replace(super().first_variation(particles, density), function=particles.x[:, 0])

    potential, x = POTENTIALS[1](THETA[1]), torch.zeros(4, 1, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=f"nll declares support = '{declared}', .* lies on both"):
        fused_pass(potential, [potential.theta], [(1.0, Both(x))], x, [x])


def test_parameters_that_v_does_not_use_have_no_gradient():
    potential, x = POTENTIALS[1](THETA[1]), torch.zeros(4, 1, dtype=torch.float64)
    idle = torch.nn.Parameter(torch.zeros(3))
    fused = fused_pass(potential, [potential.theta, idle], CASES[1]["reward"].objective.stationary, x, [None])
    assert fused.gradients[1] is None and fused.gradients[0] is not None
