"""Stationary laws π_θ ∝ e^{−V} that tests can integrate and sample exactly, in 1-D and 2-D, in float64.

The integrands are smooth and vanish at the ends of the grids, where the trapezoidal rule converges faster than any
power of the spacing; `test_potentials.py` shows its error by doubling the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from implicit_diffusion.gradients.fused import fused_pass
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers import State


class Quartic(nn.Module):
    """V(x) = x⁴/8 + θ_1 x²/2 − θ_0 x on events of shape (1,)."""

    def __init__(self, theta: tuple[float, ...] = (0.3, -0.4)) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def line(self, x: Tensor) -> Tensor:
        return x**4 / 8 + self.theta[1] * x**2 / 2 - self.theta[0] * x

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x[:, 0])

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n exact draws with shape (n, 1): the inverse of the cumulative sum on a fine grid."""
        edges = torch.linspace(-6, 6, 24001, dtype=torch.float64)
        middle = (edges[1:] + edges[:-1]) / 2
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), torch.softmax(-self.line(middle), 0).cumsum(0)])
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        i = (torch.searchsorted(cdf, u) - 1).clamp(0, len(middle) - 1)
        return (edges[i] + (u - cdf[i]) / (cdf[i + 1] - cdf[i]) * (edges[1] - edges[0]))[:, None]


class Banana(Quartic):
    """V(x) = x_1⁴/8 + θ_1 x_1²/2 − θ_0 x_1 + (x_2 − θ_2 x_1²/2)²/2 on events of shape (2,)."""

    def __init__(self, theta: tuple[float, ...] = (0.3, -0.4, 0.4)) -> None:
        super().__init__(theta)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x[:, 0]) + (x[:, 1] - self.theta[2] * x[:, 0] ** 2 / 2) ** 2 / 2

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        first = super().draw(n, generator)
        xi = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        return torch.cat([first, self.theta[2] * first**2 / 2 + xi], 1)


class Harmonic(nn.Module):
    """V(x) = ‖x‖²/2 on events of any shape: the standard normal law. Its parameter does nothing."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).square().sum(1) / 2 + 0 * self.unused


class Location(nn.Module):
    """V(x) = s ‖x − θ‖²/2 on vectors: N(θ, 1/s), whose every gradient is a line of algebra."""

    def __init__(self, theta: Tensor, stiffness: float = 1.0) -> None:
        super().__init__()
        self.theta, self.stiffness = nn.Parameter(theta.clone()), stiffness

    def forward(self, x: Tensor) -> Tensor:
        return self.stiffness * (x - self.theta).square().sum(1) / 2


class Grid:
    """A regular grid on a box; integrals are sums over its points times the cell.

    Args:
        box: (low, high) of every dimension.
        spacing: about; the ends belong to the grid.
    """

    def __init__(self, box: tuple[tuple[float, float], ...], spacing: float) -> None:
        axes = [torch.linspace(a, b, round((b - a) / spacing) + 1, dtype=torch.float64) for a, b in box]
        self.axes, self.points = axes, torch.cartesian_prod(*axes).view(-1, len(box))
        self.log_cell = sum(math.log(axis[1] - axis[0]) for axis in axes)

    @torch.no_grad()
    def law(self, potential: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
        """The probability of every cell under π ∝ e^{−V}, and log Z."""
        logs = -potential(self.points)
        return logs.softmax(0), (logs.logsumexp(0) + self.log_cell).item()

    def mean(self, potential: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor]) -> float:
        """E_π of a function (n, d) → (n,)."""
        with torch.no_grad():
            return (self.law(potential)[0] @ function(self.points)).item()


def line(spacing: float = 0.1) -> Grid:
    """For `Quartic`."""
    return Grid(((-5.0, 5.0),), spacing)


def plane(spacing: float = 0.3) -> Grid:
    """For `Banana`."""
    return Grid(((-4.4, 4.4), (-6.0, 9.2)), spacing)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖²."""
    return (x[:, None] - y[None]).square().flatten(2).sum(-1)


def entropic(a: Tensor, b: Tensor, cost: Tensor, epsilon: float) -> tuple[float, Tensor, Tensor]:
    """OT_ε = min ⟨T, C⟩ + ε KL(T‖a⊗b), and its potentials f, g, by plain scalings in float64."""
    kernel = (-cost / epsilon).exp()
    v = torch.ones_like(b)
    for _ in range(20000):
        u = 1 / (kernel @ (b * v))
        w = 1 / (kernel.mT @ (a * u))
        done = (w / v - 1).abs().max() < 1e-14
        v = w
        if done:
            break
    f, g = epsilon * u.log(), epsilon * v.log()
    return (a @ f + b @ g).item(), f, g


def sinkhorn_divergence(a: Tensor, x: Tensor, b: Tensor, y: Tensor, epsilon: float) -> float:
    """OT_ε(p, q) − ½ OT_ε(p, p) − ½ OT_ε(q, q) of weighted points."""
    across, one, other = (
        entropic(p, q, distances(s, t), epsilon)[0] for p, q, s, t in ((a, b, x, y), (a, a, x, x), (b, b, y, y))
    )
    return across - (one + other) / 2


def difference_quotient(value: Callable[[], float], theta: Tensor, step: float = 1e-4) -> Tensor:
    """∇_θ value by central differences; θ is moved in place and put back."""
    gradient = torch.zeros_like(theta)
    for i in range(theta.numel()):
        sides = []
        for sign in (1, -1):
            theta.data[i] += sign * step
            sides.append(value())
            theta.data[i] -= sign * step
        gradient[i] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def estimate(potential, objective, x, log_weights=None, seed: int = 0) -> Tensor:
    """Γ as one vector; with log-weights those of the particles."""
    parameters, generator = list(potential.parameters()), torch.Generator().manual_seed(seed)
    points = [term.draw(generator) for _, term in objective.stationary]
    weigh = None if log_weights is None else lambda here: Particles(x.detach(), log_weights)
    fused = fused_pass(potential, parameters, objective.stationary, x, points, weigh)
    return torch.cat([g.flatten() for g in fused.gradients])


def advance(kernel, potential, x, steps: int, seed: int, momentum=None):
    """Some steps of a kernel; returns the last state and the diagnostics of the last step."""
    generator, state = torch.Generator().manual_seed(seed), State(x, momentum)
    for k in range(steps):
        state, info = kernel.move(kernel.prepare(potential, state, generator, k))
    return state, info


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    """(mean − expected)/standard error over the first dimension."""
    return (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))
