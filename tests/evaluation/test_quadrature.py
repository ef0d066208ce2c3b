"""Figures by quadrature against closed forms and finer grids, and the grid's sums cell by cell."""

import math

import pytest
import torch

from implicit_diffusion.evaluation.quadrature import CELL, Grid, Quadrature
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import GaussianMixture, Tilted, mlp
from implicit_diffusion.potentials.plane import Law, law
from tests.helpers.energy_models import bent

F64 = torch.float64
ZERO, ONE = torch.zeros(2), torch.ones(2)


def itself(target, shift, scale, std=0.2):
    """The potential, in standardised coordinates, whose law is that of `eight-gaussians`."""
    return GaussianMixture((target.modes - shift) / scale, target.masses.log(), std / scale[0].item())


def test_a_law_has_no_divergence_from_itself():
    target, shift, scale = law("eight-gaussians"), torch.tensor([0.3, -0.2]), torch.tensor([1.25, 1.25])
    potential = itself(target, shift.double(), scale.double())
    fit = Quadrature(shift, scale, target).exact_fit(potential)
    assert abs(fit.kl) < 1e-10
    assert fit.log_z == pytest.approx(potential.log_z, abs=1e-10)
    x = target.sample(100_000, Noise(2))
    values = -target.log_density(x)
    assert abs(fit.nll - values.mean().item()) < 4 * values.std().item() / math.sqrt(len(x))  # the entropy
    assert fit.mode_masses == pytest.approx(target.masses.tolist(), abs=3e-4) and fit.mode_error < 1e-3


def test_a_divergence_between_mixtures_against_draws():
    """Equal weights on the modes: KL = Σ m log 8m, as good as exactly, since the modes are far apart."""
    target = law("eight-gaussians")
    potential = itself(target, ZERO.double(), ONE.double())
    potential.logits.data.zero_()
    fit = Quadrature(ZERO, ONE, target).exact_fit(potential)
    m = target.masses
    assert fit.kl == pytest.approx((m * (8 * m).log()).sum().item(), abs=2e-4)
    assert fit.mode_error == pytest.approx((m - 1 / 8).abs().sum().item() / 2, abs=5e-4)


def test_figures_of_a_gaussian_are_closed_forms():
    """Of N(shift, diag(scale²)): log Z = log 2π in its own coordinates, and −E log π by the law's moments."""
    target, shift, scale = law("eight-gaussians"), torch.tensor([0.2, 0.1]), torch.tensor([0.7, 0.9])
    potential = Tilted(mlp(2, Noise(0), width=4, depth=1), (2,))
    fit = Quadrature(shift, scale, target).exact_fit(potential)
    assert fit.log_z == pytest.approx(math.log(2 * math.pi), abs=1e-6)  # single precision of V
    squares = (target.masses @ (target.modes - shift).square() + 0.2**2) / scale.double() ** 2
    nll = squares.sum().item() / 2 + math.log(2 * math.pi) + scale.log().sum().item()
    assert fit.nll == pytest.approx(nll, abs=1e-6)
    log_q, _ = Quadrature(shift, scale).log_density(potential.double())
    assert log_q.exp().sum().item() * CELL**2 == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", [pytest.param("moons", marks=pytest.mark.slow), "eight-gaussians"])
def test_halving_the_cell_changes_nothing(name):
    target, model = law(name), bent()
    potential = model.potential.double()
    coarse, fine = (
        Quadrature(model.shift, model.scale, target, cell=cell).exact_fit(potential) for cell in (CELL, CELL / 2)
    )
    for figure in ("kl", "nll", "log_z"):
        assert abs(getattr(coarse, figure) - getattr(fine, figure)) < 1e-6
    assert fine.kl > 0.1


def test_laws_without_modes_have_no_figures_of_modes():
    target = Law(lambda n, noise: noise.normal((n, 2)), lambda x: -x.square().sum(1) / 2 - math.log(2 * math.pi))
    potential = Tilted(mlp(2, Noise(0), width=4, depth=1), (2,)).double()
    fit = Quadrature(ZERO, ONE, target).exact_fit(potential)
    assert fit.mode_masses is None and fit.mode_error is None
    assert fit.kl == pytest.approx(0, abs=2e-6)  # what lies beyond five deviations
    assert fit.nll == pytest.approx(1 + math.log(2 * math.pi), abs=1e-4)


def test_figures_on_the_checkerboard():
    """A density with jumps: the cells' edges lie on them. E |x|² = 8/3 by hand."""
    scale = torch.tensor([1.1, 1.2])
    fit = Quadrature(ZERO, scale, law("checkerboard")).exact_fit(
        Tilted(mlp(2, Noise(0), width=4, depth=1), (2,)).double()
    )
    nll = (4 / 3 / scale.double().square()).sum().item() / 2 + math.log(2 * math.pi) + scale.log().sum().item()
    assert fit.nll == pytest.approx(nll, abs=2e-3)  # the midpoint rule on squares has an error of cell²/24
    assert fit.kl == pytest.approx(fit.nll - math.log(8), abs=1e-12)


def test_the_edge_is_the_outermost_cells():
    """A uniform density on 8 by 8 cells has 28/64 of its mass there, and a lump its own, wherever it lies."""
    grid = Grid(2.0, 8)
    uniform = torch.full((64,), -math.log(16), dtype=F64)
    assert grid.mass_at_edge(uniform) == pytest.approx(28 / 64, rel=1e-9)
    for row, column, at_edge in ((0, 3, 1.0), (7, 0, 1.0), (4, 7, 1.0), (1, 1, 0.0), (6, 3, 0.0)):
        lump = torch.full((8, 8), -math.inf, dtype=F64)
        lump[row, column] = math.log(4)  # over an area of a quarter
        assert grid.mass_at_edge(lump.flatten()) == pytest.approx(at_edge, abs=1e-9)


def test_the_grid_is_of_midpoints_in_the_models_coordinates():
    shift, scale = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.5])
    quadrature = Quadrature(shift, scale, half=1.0, cell=0.5)
    grid = quadrature.grid
    assert grid.axis.tolist() == [-0.75, -0.25, 0.25, 0.75] and grid.area == 0.25
    torch.testing.assert_close(quadrature.standardised, (grid.points - shift) / scale)
    assert quadrature.log_jacobian == pytest.approx(0.0, abs=1e-7)  # 2 · 0.5
