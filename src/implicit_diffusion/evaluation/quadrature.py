"""Exact figures of models on the plane: sums over a grid of midpoints, in double precision.

The midpoint rule converges exponentially for smooth laws. It is good as well for a density that jumps where the jumps
are cell boundaries, as are the edges of the checkerboard's squares on the default grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.potentials.plane import Law

HALF_SIDE, CELL = 8.0, 1 / 16  # the default grid covers [−8, 8]² in cells of this side


class Grid:
    """Midpoints of the cells of [−half, half]².

    Args:
        half: half the side of the square.
        cells: per axis.

    Attributes:
        axis: the midpoints of one axis, with shape (cells,).
        points: all midpoints, with shape (cells², 2).
        cell: the side of a cell.
        area: of a cell.
    """

    def __init__(self, half: float, cells: int) -> None:
        self.cell = 2 * half / cells
        self.area = self.cell**2
        self.axis = -half + self.cell * (torch.arange(cells, dtype=torch.float64) + 0.5)
        self.points = torch.cartesian_prod(self.axis, self.axis)

    def mass_at_edge(self, log_density: Float[Tensor, " points"]) -> float:
        """The mass in the outermost cells, which shows whether the law fits on the grid."""
        interior = log_density.view(len(self.axis), -1)[1:-1, 1:-1]
        return (log_density.logsumexp(0).exp() - interior.flatten().logsumexp(0).exp()).item() * self.area


@dataclass(frozen=True)
class ExactFit:
    """How well a model fits a known law, exactly.

    Args:
        log_z: log ∫ e^{−V} of the model's coordinates.
        nll: −E_ref log π, in nats.
        kl: KL(p_ref‖π), in nats.
        mode_masses: the model's mass nearest to each mode, for a law with modes.
        mode_error: the total variation Σ |mass − true mass|/2.
    """

    log_z: float
    nll: float
    kl: float
    mode_masses: list[float] | None = None
    mode_error: float | None = None


class Quadrature:
    """Exact figures of models whose coordinates are z = (x − shift)/scale, by the midpoint rule.

    Args:
        shift, scale: of the model's coordinates, each with shape (2,).
        target: the law to compare with; None where there is none.
        half, cell: the grid covers [−half, half]² in the data's coordinates, in cells of this side.
    """

    def __init__(
        self,
        shift: Float[Tensor, "2"],
        scale: Float[Tensor, "2"],
        target: Law | None = None,
        half: float = HALF_SIDE,
        cell: float = CELL,
    ) -> None:
        self.grid = Grid(half, round(2 * half / cell))
        self.standardised = (self.grid.points - shift.double()) / scale.double()
        self.log_jacobian = scale.double().log().sum().item()
        self.target = target
        self.log_target = None if target is None else target.log_density(self.grid.points)

    @torch.no_grad()
    def log_density(self, potential: nn.Module) -> tuple[Float[Tensor, " points"], float]:
        """Log of the model's density at the midpoints, per area of the data's plane, and log ∫ e^{−V(z)} dz."""
        first = next(potential.parameters())
        parts = self.standardised.to(first.device, first.dtype).split(2**15)
        energy = torch.cat([potential(part) for part in parts]).double().cpu()
        log_z = (-energy).logsumexp(0).item() + math.log(self.grid.area) - self.log_jacobian
        return -energy - log_z - self.log_jacobian, log_z

    def exact_fit(self, potential: nn.Module) -> ExactFit:
        """The figures of a potential compared with the target; only for a `Quadrature` that has one."""
        log_p, target = self.log_target, self.target
        assert log_p is not None and target is not None
        log_q, log_z = self.log_density(potential)
        p = log_p.exp() * self.grid.area
        support = p > 0
        nll = -(p[support] @ log_q[support]).item()
        kl = nll + (p[support] @ log_p[support]).item()
        if target.modes is None or target.masses is None:
            return ExactFit(log_z, nll, kl)
        nearest = torch.cdist(self.grid.points, target.modes).argmin(1)
        masses = torch.zeros(len(target.modes), dtype=torch.float64)
        masses.index_add_(0, nearest, log_q.exp() * self.grid.area)
        return ExactFit(log_z, nll, kl, masses.tolist(), (masses - target.masses).abs().sum().item() / 2)
