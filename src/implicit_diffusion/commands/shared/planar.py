"""Laws on the plane whose densities are known, and exact figures of models on the plane.

Moons, circles and two spirals are Gaussian noise around curves, i.e. mixtures of equal Gaussians around many centres;
eight Gaussians bear masses 1:2:…:8; the checkerboard is uniform on eight squares. Expectations are sums over a grid of
midpoints whose cell boundaries contain the squares' edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.showing import Shown

CENTRES = 256  # on curves; their spacing is a small part of the noise
HALF, CELL = 8.0, 1 / 16  # the grid covers [−8, 8]²; midpoints of smooth laws converge exponentially


@dataclass(frozen=True, repr=False)
class Law(Shown):
    """A law on the plane.

    Args:
        sample: (n, noise) ↦ n draws, with shape (n, 2).
        log_density: (n, 2) ↦ (n,), in double precision.
        modes: centres of its modes, with shape (modes, 2), where it has some.
        masses: their probabilities.
    """

    sample: Callable[[int, Noise], Tensor]
    log_density: Callable[[Tensor], Tensor]
    modes: Tensor | None = None
    masses: Tensor | None = None


def law(name: str) -> Law:
    """The law called `name`, one of `LAWS`."""
    return LAWS[name]()


def _moons() -> Law:
    from sklearn.datasets import make_moons

    return _around(make_moons(CENTRES, shuffle=False)[0], std=0.1)


def _circles() -> Law:
    from sklearn.datasets import make_circles

    return _around(make_circles(CENTRES, shuffle=False, factor=0.5)[0], std=0.08)


def _two_spirals() -> Law:
    turns = np.sqrt((np.arange(CENTRES // 2) + 0.5) / (CENTRES // 2)) * 1.5 * math.tau
    arm = turns[:, None] / (1.5 * math.pi) * np.stack([np.cos(turns), np.sin(turns)], 1)
    return _around(np.concatenate([arm, -arm]), std=0.1)


def _eight_gaussians() -> Law:
    angles = np.arange(8) * math.tau / 8
    return _around(2 * np.stack([np.cos(angles), np.sin(angles)], 1), std=0.2, masses=torch.arange(1.0, 9.0) / 36)


def _around(centres: np.ndarray, std: float, masses: Tensor | None = None) -> Law:
    means = torch.from_numpy(centres).double()
    mixture = GaussianMixture(means, None if masses is None else masses.double().log(), std).requires_grad_(False)

    def log_density(x: Tensor) -> Tensor:
        return torch.cat([-mixture(part) - mixture.log_z for part in x.double().split(2**15)])

    def sample(n: int, noise: Noise) -> Tensor:
        return mixture.sample(n, noise).float()

    return Law(sample, log_density, None if masses is None else means, None if masses is None else masses.double())


def _checkerboard() -> Law:
    squares = torch.tensor([(i, j) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0])

    def log_density(x: Tensor) -> Tensor:
        i, j = x.double().floor().unbind(1)
        inside = (i.abs() <= 2) & (i < 2) & (j >= -2) & (j < 2) & ((i + j) % 2 == 0)
        return torch.full_like(i, -math.log(len(squares))).where(inside, -math.inf)  # of i's dtype

    def sample(n: int, noise: Noise) -> Tensor:
        generator = noise.generator(0)
        which = torch.randint(len(squares), (n,), generator=generator)
        return squares[which] + torch.rand((n, 2), generator=generator)

    return Law(sample, log_density)


LAWS: dict[str, Callable[[], Law]] = {
    "moons": _moons,
    "circles": _circles,
    "checkerboard": _checkerboard,
    "eight-gaussians": _eight_gaussians,
    "two-spirals": _two_spirals,
}


class Quadrature:
    """Exact figures of a model on the plane by the midpoint rule in double precision.

    Args:
        shift, scale: z = (x − shift)/scale are the model's coordinates, each with shape (2,).
        target: the law to compare with, where there is one.
        half, cell: the grid covers [−half, half]² in the data's coordinates, in cells of this side.
    """

    def __init__(
        self, shift: Tensor, scale: Tensor, target: Law | None = None, half: float = HALF, cell: float = CELL
    ) -> None:
        self.axis = torch.arange(-half + cell / 2, half, cell, dtype=torch.float64)
        self.grid, self.area = torch.cartesian_prod(self.axis, self.axis), cell**2
        self.points = (self.grid - shift.double()) / scale.double()
        self.log_jacobian = scale.double().log().sum().item()
        self.target, self.log_p = target, None if target is None else target.log_density(self.grid)

    def at_edge(self, log_density: Float[Tensor, " cells"]) -> float:
        """The mass in the outermost cells, which tells whether the law fits on the grid."""
        inner = log_density.view(len(self.axis), -1)[1:-1, 1:-1]
        return (log_density.logsumexp(0).exp() - inner.flatten().logsumexp(0).exp()).item() * self.area

    @torch.no_grad()
    def log_density(self, potential: nn.Module) -> tuple[Float[Tensor, " cells"], float]:
        """Log of the model's density at the cells, per area of the data's plane, and log ∫ e^{−V(z)} dz."""
        first = next(potential.parameters())
        parts = self.points.to(first.device, first.dtype).split(2**15)
        energy = torch.cat([potential(part) for part in parts]).double().cpu()
        log_z = (-energy).logsumexp(0).item() + math.log(self.area) - self.log_jacobian
        return -energy - log_z - self.log_jacobian, log_z

    def figures(self, potential: nn.Module) -> dict[str, Any]:
        """`log_z` (of the model's coordinates), `nll` = −E_ref log π in nats, `kl` = KL(p_ref‖π), and of laws with
        modes `mode_masses`, the model's mass nearest to each, with `mode_error` = Σ |mass − true mass|/2.
        """
        log_p, target = self.log_p, self.target
        assert log_p is not None and target is not None
        log_q, log_z = self.log_density(potential)
        p = log_p.exp() * self.area
        here = p > 0
        nll = -(p[here] @ log_q[here]).item()
        found: dict[str, Any] = {"log_z": log_z, "nll": nll, "kl": nll + (p[here] @ log_p[here]).item()}
        if target.modes is not None and target.masses is not None:
            nearest = torch.cdist(self.grid, target.modes).argmin(1)
            masses = torch.zeros(len(target.modes), dtype=torch.float64)
            masses.index_add_(0, nearest, log_q.exp() * self.area)
            found |= {"mode_masses": masses.tolist(), "mode_error": (masses - target.masses).abs().sum().item() / 2}
        return found
