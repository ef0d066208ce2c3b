"""The grid's sums cell by cell, and where the laws of the plane lie."""

import math

import pytest
import torch

from implicit_diffusion.commands.shared.planar import Quadrature, law
from implicit_diffusion.noise import Noise

F64 = torch.float64
ONE = torch.ones(2), torch.ones(2)


def test_the_edge_is_the_outermost_cells():
    """A uniform density on 8 by 8 cells has 28/64 of its mass there, and a lump its own, wherever it lies."""
    grid = Quadrature(*ONE, half=2.0, cell=0.5)
    uniform = torch.full((64,), -math.log(16), dtype=F64)
    assert grid.at_edge(uniform) == pytest.approx(28 / 64, rel=1e-9)
    for row, column, at_edge in ((0, 3, 1.0), (7, 0, 1.0), (4, 7, 1.0), (1, 1, 0.0), (6, 3, 0.0)):
        lump = torch.full((8, 8), -math.inf, dtype=F64)
        lump[row, column] = math.log(4)  # over an area of a quarter
        assert grid.at_edge(lump.flatten()) == pytest.approx(at_edge, abs=1e-9)


def test_the_grid_is_of_midpoints_in_the_models_coordinates():
    shift, scale = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.5])
    grid = Quadrature(shift, scale, half=1.0, cell=0.5)
    assert grid.axis.tolist() == [-0.75, -0.25, 0.25, 0.75] and grid.area == 0.25
    torch.testing.assert_close(grid.points, (grid.grid - shift) / scale)
    assert grid.log_jacobian == pytest.approx(0.0, abs=1e-7)  # 2 · 0.5


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
