"""First variations: what an objective F knows of the direction in which a distribution p should move.

F′(p) is the function with d/dε F((1−ε)p + εq) = ∫F′(p) d(q − p) at ε = 0, defined up to a constant. What an estimator
needs of it is the signed measure μ = F′(p)·p, since F′ itself may be unknown where μ is not: for KL(p_ref‖p),
F′ = −p_ref/p asks for two densities, and μ = −p_ref for draws from p_ref alone.

An objective returns μ. The gradient of θ ↦ F(π_θ) needs another measure, the solution ν of (∇²_p G) ν = −F′ on
measures of mass zero, which depends on the inner problem G as well: `implicit_diffusion.gradients` solves for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.particles import Particles
from implicit_diffusion.showing import Shown

Support = Literal["particles", "points", "both", "none"]


@dataclass(frozen=True, repr=False)
class Density(Shown):
    """What one iteration knows of the density e^{−V}/Z behind its particles.

    Args:
        energy: V at the particles, with shape (n,).
        points: the points that the term's `draw` returned, with shape (m, *event); None where it draws none.
        energy_at_points: V at these points, with shape (m,).
    """

    energy: Float[Tensor, " n"]
    points: Float[Tensor, "m *event"] | None = None
    energy_at_points: Float[Tensor, " m"] | None = None


@dataclass(frozen=True, repr=False)
class FirstVariation(Shown):
    """The signed measure μ = F′(p)·p on particles Σ_i w_i δ_{x_i} and on points outside of them.

    Args:
        function: F′ at the particles, with shape (n,), up to a constant; None where μ has no mass on them.
        on_points: μ on the points that `draw` returned, with shape (m,); None where it has no mass there.
        total_on_points: the sum of `on_points` where it is known exactly; otherwise they are added up.
        value: F(p); None where the particles do not determine it.
    """

    function: Float[Tensor, " n"] | None = None
    on_points: Float[Tensor, " m"] | None = None
    total_on_points: float | None = None
    value: Float[Tensor, ""] | None = None

    def on_particles(self, particles: Particles) -> Float[Tensor, " n"]:
        """μ on the particles, w_i F′_i, with shape (n,)."""
        return particles.weights * 0 if self.function is None else particles.weights * self.function

    def check_support(self, name: str, support: Support) -> None:
        """Raise `InvalidInputError` where the measure lies elsewhere than the term of this name declares."""
        function, on_points = self.function is not None, self.on_points is not None
        outside = {"particles": on_points, "points": function, "none": function or on_points, "both": False}
        if outside[support]:
            lies = "both" if function and on_points else "particles" if function else "points"
            raise InvalidInputError(
                f"{name} declares support = {support!r}, but its first variation lies on {lies}; declare {lies!r}"
            )

    @property
    def mass_on_points(self) -> Float[Tensor, ""] | float:
        """The total of μ on the points."""
        if self.on_points is None:
            return 0.0
        return processes.total(self.on_points.sum()) if self.total_on_points is None else self.total_on_points
