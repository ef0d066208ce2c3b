"""Laws of the plane: densities and draws agree."""

import math

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials.plane import LAWS, law

F64 = torch.float64
ZERO, ONE = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_law_of_the_density(name):
    """Counts in squares of side 5/8 have the masses of the quadrature: χ² at 4 deviations."""
    target = law(name)
    quadrature = Quadrature(ZERO, ONE, target, half=5.0)
    p = quadrature.log_target.exp() * quadrature.grid.area
    assert p.sum().item() == pytest.approx(1, abs=1e-9) and quadrature.log_target.dtype == F64
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAWS if name != "checkerboard"])
def test_moments_of_smooth_laws(name):
    """Draws against the density, to second order, and the density off its grid."""
    target = law(name)
    quadrature = Quadrature(ZERO, ONE, target)
    p, x = quadrature.log_target.exp() * quadrature.grid.area, target.sample(40_000, Noise(5)).double()
    for f in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 0] * x[:, 1], lambda x: x.square().sum(1)):
        error = f(x).std().item() / math.sqrt(len(x))
        assert abs(f(x).mean().item() - (p @ f(quadrature.grid.points)).item()) < 4 * error


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
    shares = torch.bincount(torch.cdist(x, target.modes).argmin(1), minlength=8) / len(x)
    error = (target.masses * (1 - target.masses) / len(x)).sqrt()
    assert ((shares - target.masses).abs() < 4 * error + 3e-4).all()  # a tail of 1e-4 lies nearer to a neighbour


def test_the_checkerboard_is_half_of_its_square():
    board = law("checkerboard")
    axis = torch.arange(-2.75, 3, 0.5, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    i, j = grid.floor().unbind(1)
    dark = (i.abs() <= 2) & (i != 2) & (j.abs() <= 2) & (j != 2) & ((i + j) % 2 == 0)
    density = board.log_density(grid).exp()
    assert (density[dark] - 1 / 8).abs().max() < 1e-12 and (density[~dark] == 0).all() and int(dark.sum()) == 32
    x = board.sample(4000, Noise(0))
    assert board.log_density(x).isfinite().all()
    squares = torch.unique(x.floor(), dim=0, return_counts=True)
    assert len(squares[0]) == 8 and ((squares[1] - 500).abs() < 4 * (500 * 7 / 8) ** 0.5).all()


def test_an_unknown_law_is_refused_with_the_names_of_all():
    with pytest.raises(InvalidInputError, match="name: got 'moon'; it must be one of moons, circles"):
        law("moon")
