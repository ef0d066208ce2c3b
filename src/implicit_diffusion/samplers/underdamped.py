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

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import check_number
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.samplers.draws import normals
from implicit_diffusion.samplers.kernel import Info, Kernel, State, Step, StepSize


class Underdamped(Kernel):
    """Underdamped Langevin dynamics with unit mass, discretised by BAOAB.

        >>> import torch
        >>> from implicit_diffusion import GaussianMixture, Noise
        >>> from implicit_diffusion.samplers import Underdamped
        >>> potential, generator = GaussianMixture(torch.zeros(1, 2)), Noise(0).generator()  # N(0, I)
        >>> kernel = Underdamped(0.5)
        >>> state = kernel.start(torch.zeros(10_000, 2), generator)
        >>> for k in range(40):
        ...     state, info = kernel.move(kernel.prepare(potential, state, generator, k))
        >>> print(f"{state.x.var():.1f}")
        1.0

    Args:
        step_size: h > 0, or a function k ↦ h_k of the iteration k = 0, 1, … (`power_law`).
        friction: γ > 0, in units of inverse time.

    Raises:
        InvalidInputError: a step size or friction that is not positive and finite.
    """

    def __init__(self, step_size: StepSize, friction: float = 1.0) -> None:
        super().__init__(step_size)
        self.friction = check_number("friction", friction, 0.0)

    def reach(self, h: float) -> float:
        """h/2: a position moves by half a step at a time."""
        return h / 2

    def start(self, x: Float[Tensor, "n *event"], generator: torch.Generator) -> State:
        """The particles with a momentum from N(0, I)."""
        return State(x, normals(generator, 1, x)[0])

    def move(self, step: Step) -> tuple[State, Info]:
        """B (two halves at once), A, O, A."""
        assert step.momentum is not None
        (xi,), h = step.draws, step.h
        kept = (-self.friction * h).exp()
        p = step.momentum - h * step.here.grad
        x = step.x + h / 2 * p
        p = kept * p + (1 - kept**2).sqrt() * xi
        return State(x + h / 2 * p, p), Info()

    def velocity(self, momentum: Float[Tensor, "n *event"], here: Energy, h: float) -> Float[Tensor, "n *event"]:
        """BAOAB's velocity after a full step: the stored momentum with its closing half-kick."""
        return momentum - h / 2 * here.grad
