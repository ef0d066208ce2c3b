"""Hamiltonian Monte Carlo (Duane et al., 1987; Neal, arXiv 1206.1901).

A fresh momentum p ~ N(0, I), L leapfrog steps of size h on H = V(x) + ‖p‖²/2, and a Metropolis test on the change of H.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import check_integer
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import ExactKernel, Move, Schedule, inner, metropolis


class HMC(ExactKernel):
    """Leaves π_θ invariant exactly.

    Args:
        step_size: h of the leapfrog.
        leapfrogs: L ≥ 1 of them per step.

    Raises:
        InvalidInputError: a step size that is not positive and finite, or no leapfrog.
    """

    target_acceptance = 0.8

    def reach(self, h: float) -> float:
        return h

    def __init__(self, step_size: Schedule, leapfrogs: int = 5) -> None:
        super().__init__(step_size)
        self.leapfrogs = check_integer("leapfrogs", leapfrogs)
        self.evaluations = 1 + self.leapfrogs

    def move(
        self,
        x: Float[Tensor, "n *event"],
        momentum: Tensor | None,
        here: Energy,
        energy: Callable[[Tensor], Energy],
        draws: tuple[Tensor, ...],
        h: Float[Tensor, ""],
    ) -> Move:
        p, uniform = draws
        y, there = x, here
        before = exact(here.value) + inner(p, p) / 2
        for _ in range(self.leapfrogs):
            p = p - h / 2 * there.grad
            y = y + h * p
            there = energy(y)
            p = p - h / 2 * there.grad
        after = exact(there.value) + inner(p, p) / 2
        return metropolis(before - after, uniform, (x, here.value), (y, there.value))
