"""Underdamped Langevin dynamics by the splitting BAOAB (Leimkuhler and Matthews, arXiv 1203.5428).

    dX = P dt,    dP = −∇V(X) dt − γP dt + √(2γ) dW

    B  p ← p − (h/2)∇V(x)        A  x ← x + (h/2) p        O  p ← e^{−γh} p + √(1 − e^{−2γh}) ξ
    A  x ← x + (h/2) p           B  p ← p − (h/2)∇V(x)

The closing B of one step and the opening B of the next use the same ∇V(x). They are done together, at the opening, so
that a step costs one evaluation; between steps the stored momentum lacks its closing half-kick, see `velocity`.

On a unit Gaussian the law of the positions is exact, N(0, 1) for every h < 2, and that of the velocities
N(0, 1 − h²/4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_number
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.samplers.kernel import Kernel, Move, Schedule, normals

NO_WEIGHTS = "underdamped Langevin has no increment of weights; take ULA, MALA or HMC"


class Underdamped(Kernel):
    """BAOAB with unit mass.

    Args:
        step_size: h.
        friction: γ > 0, in units of inverse time.

    Raises:
        InvalidInputError: a step size or friction that is not positive and finite.
    """

    weighted = False

    def __init__(self, step_size: Schedule, friction: float = 1.0) -> None:
        super().__init__(step_size)
        self.friction = check_number("friction", friction, 0.0)

    def reach(self, h: float) -> float:
        return h / 2

    def momentum(self, generator: torch.Generator, x: Float[Tensor, "n *event"]) -> Float[Tensor, "n *event"]:
        return normals(generator, 1, x)[0]

    def move(
        self,
        x: Float[Tensor, "n *event"],
        momentum: Tensor | None,
        here: Energy,
        energy: Callable[[Tensor], Energy],
        draws: tuple[Tensor, ...],
        h: Float[Tensor, ""],
    ) -> Move:
        (xi,) = draws
        assert momentum is not None
        kept = (-self.friction * h).exp()
        p = momentum - h * here.grad
        x = x + h / 2 * p
        p = kept * p + (1 - kept**2).sqrt() * xi
        return Move(x + h / 2 * p, p)

    def owe(self, x: Float[Tensor, "n *event"], here: Energy, move: Move, h: Float[Tensor, ""]) -> Float[Tensor, " n"]:
        raise InvalidInputError(NO_WEIGHTS)

    def repay(
        self, previous: Float[Tensor, "n *event"], x: Float[Tensor, "n *event"], here: Energy, h: Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        raise InvalidInputError(NO_WEIGHTS)

    def velocity(self, momentum: Float[Tensor, "n *event"], here: Energy, h: float) -> Float[Tensor, "n *event"]:
        """BAOAB's velocity after a full step: the stored momentum with its closing half-kick."""
        return momentum - h / 2 * here.grad
