"""Squared distances keep their digits wherever the points lie, in bounded memory, and so do MMD and Sinkhorn."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_diffusion.objectives import MMD, Sinkhorn
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import squared_distances

F64 = torch.float64


def grid(n, d=3, seed=0):
    """Points that stay exact in single precision when they move by whole numbers up to 10⁵."""
    return (32 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))).round() / 32


def direct(x, y):
    return (x[:, None].to(F64) - y.to(F64)).square().flatten(2).sum(2)


@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_squared_distances_do_not_depend_on_the_origin(offset, dtype):
    x, y = (grid(n, seed=n) for n in (30, 20))
    x = (x + offset).to(dtype).requires_grad_()
    found = squared_distances(x, (y + offset).to(dtype))
    torch.testing.assert_close(found, direct(grid(30, seed=30), y), rtol=1e-9, atol=1e-9)
    weights = torch.rand(30, 20, generator=torch.Generator().manual_seed(1), dtype=F64)
    (gradient,) = torch.autograd.grad((weights * found).sum(), x)
    expected = 2 * (weights[:, :, None] * (grid(30, seed=30)[:, None] - y)).sum(1)
    torch.testing.assert_close(gradient.to(F64), expected.to(F64), rtol=1e-6, atol=1e-5)


def test_clusters_that_are_far_apart_keep_their_inner_distances():
    """No common centre lies near both."""
    x = torch.cat([grid(10), grid(10, seed=1) + 4096])
    torch.testing.assert_close(squared_distances(x, x), direct(x, x), rtol=1e-9, atol=1e-6)


def test_far_from_zero_in_double_precision():
    x, y = grid(9).to(F64), grid(7, seed=1).to(F64)
    torch.testing.assert_close(squared_distances(x + 2**30, y + 2**30), direct(x, y), rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_tensor_is_larger_than_the_matrix():
    x = torch.zeros(50, 1000, requires_grad=True)
    with Largest() as largest:
        squared_distances(x, torch.zeros(40, 1000)).sum().backward()
    assert largest.numel == 50 * 1000


@pytest.mark.parametrize("build", [MMD, lambda data: Sinkhorn(data, 1.0)], ids=["mmd", "sinkhorn"])
@pytest.mark.parametrize("offset", [4096, 65536])
def test_divergences_are_those_of_the_points_moved_to_the_origin(build, offset):
    def both(by):
        x = (grid(40) + by).requires_grad_()
        value = build(grid(30, seed=1) + 0.5 + by).value(Particles(x))
        return (
            value.item(),
            torch.autograd.grad(value, x)[0],
            build(grid(30, seed=1) + 0.5 + by).first_variation(Particles(x.detach())).function,
        )

    (value, gradient, variation), (right, slope, charge) = both(offset), both(0)
    assert value == pytest.approx(right, rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(variation, charge, rtol=1e-4, atol=1e-5)
