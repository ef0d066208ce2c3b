"""Laws on the plane whose densities are known: data to try energy-based models on.

Moons, circles and two spirals are Gaussian noise around curves, i.e. mixtures of equal Gaussians around many centres;
the eight Gaussians have masses 1:2:…:8; the checkerboard is uniform on eight squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials.mixture import GaussianMixture
from implicit_diffusion.showing import Shown

CENTRES = 256  # on curves; their spacing is a small part of the noise


@dataclass(frozen=True, repr=False)
class Law(Shown):
    """A law on the plane.

    Args:
        sample: (n, noise) ↦ n draws, with shape (n, 2).
        log_density: (n, 2) ↦ (n,), in double precision.
        modes: centres of its modes, with shape (modes, 2); None for a law without separate modes.
        masses: probabilities of the modes, with shape (modes,).
    """

    sample: Callable[[int, Noise], Float[Tensor, "n 2"]]
    log_density: Callable[[Float[Tensor, "n 2"]], Float[Tensor, " n"]]
    modes: Float[Tensor, "modes 2"] | None = None
    masses: Float[Tensor, " modes"] | None = None


def law(name: str) -> Law:
    """The law called `name`.

    Args:
        name: one of `LAWS`.

    Raises:
        InvalidInputError: an unknown name.
    """
    if name not in LAWS:
        raise InvalidInputError(f"name: got {name!r}; it must be one of {', '.join(LAWS)}")
    return LAWS[name]()


def _moons() -> Law:
    require("sklearn")
    from sklearn.datasets import make_moons

    return _around(make_moons(CENTRES, shuffle=False)[0], std=0.1)


def _circles() -> Law:
    require("sklearn")
    from sklearn.datasets import make_circles

    return _around(make_circles(CENTRES, shuffle=False, factor=0.5)[0], std=0.08)


def _two_spirals() -> Law:
    turns = np.sqrt((np.arange(CENTRES // 2) + 0.5) / (CENTRES // 2)) * 1.5 * math.tau
    arm = turns[:, None] / (1.5 * math.pi) * np.stack([np.cos(turns), np.sin(turns)], 1)
    return _around(np.concatenate([arm, -arm]), std=0.1)


def _eight_gaussians() -> Law:
    angles = np.arange(8) * math.tau / 8
    return _around(2 * np.stack([np.cos(angles), np.sin(angles)], 1), std=0.2, masses=torch.arange(1.0, 9.0) / 36)


def _around(centres: np.ndarray, std: float, masses: Float[Tensor, " modes"] | None = None) -> Law:
    """Gaussians around centres of shape (modes, 2); they count as modes where they have masses of their own."""
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
