"""The hexagon: six Gaussians, a reward for a corner, and everything about it that is known exactly.

    V(x; θ) = −log Σ_i softmax(θ)_i e^{−‖x − c_i‖²/(2σ²)},     c_i at radius 4, angles 0°, 60°, …
    R_hard(x) = 1[x_1 ≥ 0] e^{−‖x − (4, 3.8)‖²/20}/2.5         what is maximised, a black box with a jump
    R_smooth(x) = sigmoid(x_1/0.5) e^{−‖x − (4, 3.8)‖²/20}/0.7  its differentiable counterpart, for guidance

(section 5.1 of Marion et al., arXiv 2402.05468). Expectations are sums over a grid of midpoints, of which the jump of
R_hard is a cell boundary.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.evaluation.quadrature import Grid
from implicit_diffusion.potentials import GaussianMixture

RADIUS, MODES = 4.0, 6
LOGITS = (1.5, 0.0, 1.5, 0.0, 1.5, 0.0)  # θ_0
CENTRE = (4.0, 3.8)  # of the reward


def mixture(
    logits: Float[Tensor, " modes"] | None = None, sigma: float = 1.0, dtype: torch.dtype = torch.float32
) -> GaussianMixture:
    """V(·; θ) with θ = logits, or θ_0 without them; the centres are fixed, with components of deviation `sigma`."""
    angles = torch.arange(MODES, dtype=torch.float64) * math.tau / MODES
    means = (RADIUS * torch.stack([angles.cos(), angles.sin()], 1)).to(dtype)
    logits = torch.tensor(LOGITS) if logits is None else logits
    potential = GaussianMixture(means, logits.to(dtype), sigma)
    potential.means.requires_grad_(False)
    return potential


def bump(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """e^{−‖x − (4, 3.8)‖²/20}."""
    return (-((x[:, 0] - CENTRE[0]).square() + (x[:, 1] - CENTRE[1]).square()) / 20).exp()


def hard_reward(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """R_hard."""
    return (x[:, 0] >= 0).to(x.dtype) * bump(x) / 2.5


def smooth_reward(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """R_smooth."""
    return torch.sigmoid(x[:, 0] / 0.5) * bump(x) / 0.7


class HexagonQuadrature:
    """Expectations under laws on the hexagon, in double precision.

    Args:
        sigma: deviation of the components.
        cells: of the grid, per axis.
    """

    def __init__(self, sigma: float = 1.0, cells: int = 800) -> None:
        self.sigma, self.grid = sigma, Grid(RADIUS + 7 * sigma, cells)

    @cached_property
    def coarse(self) -> HexagonQuadrature:
        """The same with a quarter of the cells per axis: enough for what has no jump, in a sixteenth of the time."""
        return HexagonQuadrature(self.sigma, len(self.grid.axis) // 4)

    @cached_property
    def of_modes(self) -> Float[Tensor, "modes points"]:
        """The density of every component; that of a mixture is their mean under its weights."""
        return torch.stack([self.density(mixture(row.log(), self.sigma, torch.float64)) for row in torch.eye(MODES)])

    @cached_property
    def per_mode(self) -> Float[Tensor, " modes"]:
        """E[R_hard | mode], 0.1887, 0.2983, 0.0045, … at σ = 1."""
        return self.of_modes @ hard_reward(self.grid.points) * self.grid.area

    @torch.no_grad()
    def density(self, potential: nn.Module) -> Float[Tensor, " points"]:
        """e^{−V}/Z at the midpoints."""
        unnormalised = (-potential(self.grid.points)).exp()
        return unnormalised / (unnormalised.sum() * self.grid.area)

    def reward(self, logits: Float[Tensor, " modes"]) -> float:
        """E R_hard under π_θ."""
        return (logits.detach().double().softmax(0) @ self.per_mode).item()

    def kl(self, p: nn.Module, q: nn.Module) -> float:
        """KL(p‖q) of the laws of two potentials in double precision, in nats."""
        return self._kl(self.density(p), self.density(q))

    def kl_of_weights(self, logits: Float[Tensor, " modes"], reference: Float[Tensor, " modes"]) -> float:
        """KL(π_θ‖π_θ′) of two mixtures, in nats."""
        return self._kl(*(each.detach().double().softmax(0) @ self.of_modes for each in (logits, reference)))

    def _kl(self, p: Float[Tensor, " points"], q: Float[Tensor, " points"]) -> float:
        """KL(p‖q) of two densities."""
        return torch.special.xlogy(p, p / q.clamp(min=1e-300)).sum().item() * self.grid.area

    def modes(self, potential: nn.Module) -> list[float]:
        """The mass nearest to each centre, for any potential."""
        nearest = torch.cdist(self.grid.points, mixture(dtype=torch.float64).means.detach()).argmin(1)
        density = self.density(potential)
        return torch.zeros(MODES, dtype=torch.float64).index_add(0, nearest, density * self.grid.area).tolist()
