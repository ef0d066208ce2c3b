"""Laws of the plane: densities and draws agree; figures by quadrature against closed forms and finer grids."""

import math

import pytest
import torch

from implicit_diffusion.commands.shared.planar import CELL, LAWS, Law, Quadrature, law
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import GaussianMixture, Tilted, mlp
from tests.helpers.energy_models import bent

F64 = torch.float64
ZERO, ONE = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_law_of_the_density(name):
    """Counts in squares of side 5/8 have the masses of the quadrature: χ² at 4 deviations."""
    target = law(name)
    quadrature = Quadrature(ZERO, ONE, target, half=5.0)
    p = quadrature.log_p.exp() * quadrature.area
    assert p.sum().item() == pytest.approx(1, abs=1e-9) and quadrature.log_p.dtype == F64
    coarse = p.view(16, 10, 16, 10).sum((1, 3)).flatten()
    x = target.sample(40_000, Noise(3))
    assert x.shape == (40_000, 2) and x.dtype == torch.float32
    assert torch.equal(x, target.sample(40_000, Noise(3))) and not torch.equal(x, target.sample(40_000, Noise(4)))
    i, j = ((x + 5) / 0.625).floor().long().unbind(1)
    counts = torch.bincount(16 * i + j, minlength=256).double()
    expected, rare = len(x) * coarse, len(x) * coarse < 5

    def chi_squared(expected):
        bins = [torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts, expected)]
        terms = (bins[0] - bins[1]).square() / bins[1].clamp(min=1)
        degrees = int((~rare).sum()) - 1
        return (terms.sum() - degrees) / math.sqrt(2 * degrees)

    assert abs(chi_squared(expected)) < 4
    assert chi_squared(expected.view(16, 16).roll(1, 0).flatten()) > 50  # it can tell


@pytest.mark.parametrize("name", [name for name in LAWS if name != "checkerboard"])
def test_moments_of_smooth_laws(name):
    """Draws against the density, to second order, and the density off its grid."""
    target = law(name)
    quadrature = Quadrature(ZERO, ONE, target)
    p, x = quadrature.log_p.exp() * quadrature.area, target.sample(40_000, Noise(5)).double()
    for f in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 0] * x[:, 1], lambda x: x.square().sum(1)):
        error = f(x).std().item() / math.sqrt(len(x))
        assert abs(f(x).mean().item() - (p @ f(quadrature.grid)).item()) < 4 * error


def test_the_checkerboard_is_uniform_on_eight_squares_of_alternating_colour():
    target = law("checkerboard")
    x = target.sample(4000, Noise(0))
    assert torch.equal(target.log_density(x), torch.full((4000,), -math.log(8), dtype=F64))
    assert {(i, j) for i, j in x.floor().long().tolist()} == {
        (i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0
    }
    outside = torch.tensor([[0.5, 1.5], [2.5, 0.5], [0.5, 2.5], [-2.5, -0.5], [-0.5, -2.5]])
    assert (target.log_density(outside) == -math.inf).all()


def test_eight_gaussians_bear_masses_one_to_eight():
    target = law("eight-gaussians")
    assert target.masses.tolist() == pytest.approx([k / 36 for k in range(1, 9)])
    x = target.sample(72_000, Noise(1)).double()
    found = torch.bincount(torch.cdist(x, target.modes).argmin(1), minlength=8) / len(x)
    error = (target.masses * (1 - target.masses) / len(x)).sqrt()
    assert ((found - target.masses).abs() < 4 * error + 3e-4).all()  # a tail of 1e-4 lies nearer to a neighbour


def itself(target, shift, scale, std=0.2):
    """The potential, in standardised coordinates, whose law is that of `eight-gaussians`."""
    return GaussianMixture((target.modes - shift) / scale, target.masses.log(), std / scale[0].item())


def test_a_law_has_no_divergence_from_itself():
    target, shift, scale = law("eight-gaussians"), torch.tensor([0.3, -0.2]), torch.tensor([1.25, 1.25])
    potential = itself(target, shift.double(), scale.double())
    found = Quadrature(shift, scale, target).figures(potential)
    assert abs(found["kl"]) < 1e-10
    assert found["log_z"] == pytest.approx(potential.log_z, abs=1e-10)
    x = target.sample(100_000, Noise(2))
    values = -target.log_density(x)
    assert abs(found["nll"] - values.mean().item()) < 4 * values.std().item() / math.sqrt(len(x))  # the entropy
    assert found["mode_masses"] == pytest.approx(target.masses.tolist(), abs=3e-4) and found["mode_error"] < 1e-3


def test_a_divergence_between_mixtures_against_draws():
    """Equal weights on the modes: KL = Σ m log 8m, as good as exactly, since the modes are far apart."""
    target = law("eight-gaussians")
    potential = itself(target, ZERO.double(), ONE.double())
    potential.logits.data.zero_()
    found = Quadrature(ZERO, ONE, target).figures(potential)
    m = target.masses
    assert found["kl"] == pytest.approx((m * (8 * m).log()).sum().item(), abs=2e-4)
    assert found["mode_error"] == pytest.approx((m - 1 / 8).abs().sum().item() / 2, abs=5e-4)


def test_figures_of_a_gaussian_are_closed_forms():
    """Of N(shift, diag(scale²)): log Z = log 2π in its own coordinates, and −E log π by the law's moments."""
    target, shift, scale = law("eight-gaussians"), torch.tensor([0.2, 0.1]), torch.tensor([0.7, 0.9])
    potential = Tilted(mlp(2, Noise(0), width=4, depth=1), (2,))
    found = Quadrature(shift, scale, target).figures(potential)
    assert found["log_z"] == pytest.approx(math.log(2 * math.pi), abs=1e-6)  # single precision of V
    squares = (target.masses @ (target.modes - shift).square() + 0.2**2) / scale.double() ** 2
    nll = squares.sum().item() / 2 + math.log(2 * math.pi) + scale.log().sum().item()
    assert found["nll"] == pytest.approx(nll, abs=1e-6)
    log_q, _ = Quadrature(shift, scale).log_density(potential.double())
    assert log_q.exp().sum().item() * CELL**2 == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", [pytest.param("moons", marks=pytest.mark.slow), "eight-gaussians"])
def test_halving_the_cell_changes_nothing(name):
    target, model = law(name), bent()
    potential = model.potential.double()
    coarse, fine = (
        Quadrature(model.shift, model.scale, target, cell=cell).figures(potential) for cell in (CELL, CELL / 2)
    )
    for figure in ("kl", "nll", "log_z"):
        assert abs(coarse[figure] - fine[figure]) < 1e-6
    assert fine["kl"] > 0.1


def test_laws_without_modes_have_no_figures_of_modes():
    target = Law(lambda n, noise: noise.normal((n, 2)), lambda x: -x.square().sum(1) / 2 - math.log(2 * math.pi))
    potential = Tilted(mlp(2, Noise(0), width=4, depth=1), (2,)).double()
    found = Quadrature(ZERO, ONE, target).figures(potential)
    assert found.keys() == {"log_z", "nll", "kl"}
    assert found["kl"] == pytest.approx(0, abs=2e-6)  # what lies beyond five deviations
    assert found["nll"] == pytest.approx(1 + math.log(2 * math.pi), abs=1e-4)


def test_figures_on_the_checkerboard():
    """A density with jumps: the cells' edges lie on them. E |x|² = 8/3 by hand."""
    scale = torch.tensor([1.1, 1.2])
    found = Quadrature(ZERO, scale, law("checkerboard")).figures(
        Tilted(mlp(2, Noise(0), width=4, depth=1), (2,)).double()
    )
    nll = (4 / 3 / scale.double().square()).sum().item() / 2 + math.log(2 * math.pi) + scale.log().sum().item()
    assert found["nll"] == pytest.approx(nll, abs=2e-3)  # the midpoint rule on squares has an error of cell²/24
    assert found["kl"] == pytest.approx(found["nll"] - math.log(8), abs=1e-12)
