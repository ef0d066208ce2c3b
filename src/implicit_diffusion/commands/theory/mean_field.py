"""Where a loop with constant steps ends, by quadrature: the mean field of infinitely many particles, and their noise.

One step of ULA, y ~ N(x − hV'(x), 2h), is a matrix P on a grid of the line. Its cells are at most half as wide as the
noise, so that the trapezoidal rule is exact to rounding. p_h(θ), the law that P leaves invariant, differs from π_θ by
O(h).

**Mean field.** Infinitely many particles under a slow θ follow p_h(θ), and the loop ends where

    Γ(θ) = mean_j ∂V(y_j) − E_{p_h(θ)} ∂V = 0,        ∂ = ∂/∂θ,

while the exact gradient there, ∇ℓ(θ_h), is of order h: a floor of order h² for its square.

**Noise.** With n particles Γ holds the mean of n independent copies of g = −∂V along a stationary chain, whose sums
over time have the variance σ² per step, with ḡ = g − E g,

    σ² = Var g + 2 Σ_{k≥1} Cov(g(X_0), g(X_k)) = 2⟨ḡ, (1 − P)^{−1} ḡ⟩_p − ⟨ḡ, ḡ⟩_p,

of order 1/h. A gradient step of size η ≪ h then makes θ an Ornstein–Uhlenbeck process of variance ησ²/(2κn) with
κ = dΓ/dθ, so that

    E ∇ℓ² = ∇ℓ(θ_h)² + ℓ''² ησ²/(2κn) + …,        the second term of order (η/h)/n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.theory.problems import Problem, root, slope

COARSEST = 0.125  # cells of the grid, at most
DIFFERENCE, NEAR = 1e-4, 1.0  # of θ: for κ, and between the optimum and θ_h at most


@dataclass(frozen=True)
class MeanField:
    """The law that ULA leaves invariant, and what a loop with constant steps makes of it.

    Args:
        problem: V and ℓ.
        step_size: h of ULA, below 2.
    """

    problem: Problem
    step_size: float

    @property
    def grid(self) -> Float[Tensor, " points"]:
        """Points of the line, with distances of at most √(2h)/2."""
        cell = min(COARSEST, math.sqrt(2 * self.step_size) / 2)
        half = math.ceil(self.problem.reach / cell)
        return cell * torch.arange(-half, half + 1, dtype=torch.float64)

    def kernel(self, theta: float) -> Float[Tensor, "points points"]:
        """P: rows are the laws after a step from each point."""
        x, h = self.grid, self.step_size
        drift = slope(lambda y: self.problem.energy(y, y.new_tensor(theta)), x)
        return (-(x - (x - h * drift)[:, None]).square() / (4 * h)).softmax(1)

    def law(self, kernel: Float[Tensor, "points points"]) -> Float[Tensor, " points"]:
        """The probabilities that a kernel leaves invariant: pP = p, of sum one."""
        equations = kernel.T - torch.eye(len(kernel), dtype=kernel.dtype)
        equations[len(kernel) // 2] = 1.0  # one of the equations says nothing new
        right = torch.zeros(len(kernel), dtype=kernel.dtype)
        right[len(kernel) // 2] = 1.0
        return torch.linalg.solve(equations, right)

    def pull(self, x: Float[Tensor, " points"], theta: float) -> Float[Tensor, " points"]:
        """∂V(x; θ)/∂θ at every point."""
        return slope(lambda t: self.problem.energy(x, t), torch.full_like(x, theta))

    def estimate(self, theta: float) -> float:
        """Γ(θ) of infinitely many particles that have settled under θ."""
        of_data = self.pull(torch.tensor(self.problem.data, dtype=torch.float64), theta).mean()
        return (of_data - self.law(self.kernel(theta)) @ self.pull(self.grid, theta)).item()

    @property
    def end(self) -> float:
        """θ_h, where Γ is zero."""
        return _end(self)

    @property
    def bias(self) -> float:
        """∇ℓ at θ_h."""
        return self.problem.gradient(torch.tensor(self.end, dtype=torch.float64)).item()

    def floor(self, ratio: float, particles: int) -> float:
        """E ∇ℓ² of n particles, to first order in η/h, with the mean-field part ∇ℓ(θ_h)² included.

        Args:
            ratio: η/h.
            particles: n.
        """
        theta = self.end
        kernel = self.kernel(theta)
        p, g = self.law(kernel), self.pull(self.grid, theta)
        g = g - p @ g
        solution = torch.linalg.solve(torch.eye(len(p), dtype=p.dtype) - kernel + p, g)  # 1 − P on functions of mean 0
        variance = ((p * g) @ (2 * solution - g)).item()
        kappa = (self.estimate(theta + DIFFERENCE) - self.estimate(theta - DIFFERENCE)) / (2 * DIFFERENCE)
        spread = ratio * self.step_size * variance / (2 * kappa * particles)
        return self.bias**2 + self.problem.curvature(theta) ** 2 * spread


@cache
def _end(field: MeanField) -> float:
    middle = field.problem.optimum
    return root(field.estimate, middle - NEAR, middle + NEAR)
