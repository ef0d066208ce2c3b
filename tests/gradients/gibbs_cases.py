"""Every objective under a stationary law, with its value by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicit_diffusion.objectives import MMD, ForwardKL, Functional, Objective, ReverseKL, Reward, Sinkhorn
from implicit_diffusion.objectives.mmd import gaussian_kernel
from tests.helpers.oracles_gibbs import (
    Banana,
    Grid,
    Quartic,
    difference_quotient,
    distances,
    entropic,
    line,
    plane,
    sinkhorn_divergence,
)

BANDWIDTH, EPSILON = 2.0, 4.0
THETA = {1: (0.3, -0.4), 2: (0.3, -0.4, 0.4)}
THETA_0 = {1: (0.1, -0.2), 2: (0.1, -0.2, 0.25)}  # where weighted particles come from
POTENTIALS = {1: Quartic, 2: Banana}
GRIDS = {1: line, 2: plane}


def data(dim: int) -> Tensor:
    """Reference points well away from the particles, so that gradients are large beside their noise."""
    return torch.randn(8, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64) * 0.5 + 2.0


def reward(x: Tensor) -> Tensor:
    return torch.tanh(x[:, 0]) * (1 + 0.3 * x[:, -1])


def functional(x: Tensor, w: Tensor) -> Tensor:
    mean = w @ x
    return (mean - 2).square().sum() + 0.5 * (w @ x.square()).sum()


@dataclass
class Case:
    """F, and ℓ(θ) by quadrature from the law on a grid, log Z and V itself.

    Args:
        objective: F.
        value: (grid, p, log_z, potential) → ℓ.
        variation: the population's F′ at any points, (x, grid, p) → (n,); only where Γ is too noisy without it.
    """

    objective: Objective
    value: Callable[[Grid, Tensor, float, torch.nn.Module], float]
    variation: Callable[[Tensor, Grid, Tensor], Tensor] | None = None


def gram(grid: Grid, p: Tensor) -> Tensor:
    """E_p k(x, X) on the grid, dimension by dimension."""
    field = p.view([len(axis) for axis in grid.axes])
    kernels = [gaussian_kernel(BANDWIDTH)(axis[:, None], axis[:, None]) for axis in grid.axes]
    field = kernels[0] @ field
    return (field if len(kernels) == 1 else field @ kernels[1]).flatten()


def cases(dim: int) -> dict[str, Case]:
    y, other = data(dim), POTENTIALS[dim]((1.2, 0.6, 0.0)[: dim + 1])
    uniform = torch.full((len(y),), 1 / len(y), dtype=torch.float64)
    mmd, sinkhorn = MMD(y, gaussian_kernel(BANDWIDTH)), Sinkhorn(y, EPSILON)

    def reverse_kl(grid, p, log_z, potential):
        return (p * (p.clamp(min=1e-300).log() - grid.law(other)[0].log())).sum().item()

    def mmd_value(grid, p, log_z, potential):
        across = gaussian_kernel(BANDWIDTH)(grid.points, y).mean(1)
        return (p @ gram(grid, p) - 2 * p @ across + mmd._within).item()

    def mmd_variation(x, grid, p):
        k = gaussian_kernel(BANDWIDTH)
        return 2 * (k(x, grid.points) @ p - k(x, y).mean(1))

    def sinkhorn_value(grid, p, log_z, potential):
        kept = p > 1e-14
        return sinkhorn_divergence(p[kept], grid.points[kept], uniform, y, EPSILON)

    def sinkhorn_variation(x, grid, p):
        kept = p > 1e-12
        q, z = p[kept], grid.points[kept]
        _, _, g = entropic(q, uniform, distances(z, y), EPSILON)
        _, f, _ = entropic(q, q, distances(z, z), EPSILON)
        across = -EPSILON * (uniform.log() + (g - distances(x, y)) / EPSILON).logsumexp(1)
        within = -EPSILON * (q.log() + (f - distances(x, z)) / EPSILON).logsumexp(1)
        return across - within

    def functional_value(grid, p, log_z, potential):
        return functional(grid.points, p).item()

    def functional_variation(x, grid, p):
        return 2 * x @ (p @ grid.points - 2) + 0.5 * x.square().sum(1)

    def forward_value(grid, p, log_z, potential):
        return (potential(y).mean() + log_z).item()

    def reward_value(grid, p, log_z, potential):
        return -(p @ reward(grid.points)).item()

    return {
        "reward": Case(Reward(reward), reward_value),
        "forward_kl": Case(ForwardKL(y), forward_value),
        "reverse_kl": Case(ReverseKL(other), reverse_kl),
        "functional": Case(Functional(functional), functional_value, functional_variation),
        "mmd": Case(mmd, mmd_value, mmd_variation),
        "sinkhorn": Case(sinkhorn, sinkhorn_value, sinkhorn_variation),
        "sum": Case(
            0.5 * Reward(reward) + 2.0 * (ReverseKL(other) + 0.5 * ForwardKL(y)),
            lambda *a: 0.5 * reward_value(*a) + 2.0 * reverse_kl(*a) + forward_value(*a),
        ),
    }


CASES = {dim: cases(dim) for dim in (1, 2)}


def exact_gradient(dim: int, name: str) -> Tensor:
    """∇ℓ(θ) by central differences of quadrature."""
    potential, grid = POTENTIALS[dim](THETA[dim]), GRIDS[dim]()

    @torch.no_grad()
    def value() -> float:
        return CASES[dim][name].value(grid, *grid.law(potential), potential)

    return difference_quotient(value, potential.theta)
