"""From a first variation to the adjoint measure: what every inner problem G has to solve for.

Let π_θ minimise G(p, θ) over distributions p. Differentiating the condition ∇_p G(π_θ, θ) = const in θ and applying
the adjoint trick,

    ∇_θ F(π_θ) = ∇_θ ∫ ∇_p G(π_θ, θ) dν,        (∇²_p G) ν = −F′ up to a constant, ν of mass zero

(Marion et al., arXiv 2402.05468, section 3.2). An objective knows F′ alone, as the signed measure F′·p
(`implicit_diffusion.objectives.variation`); an `AdjointSolver` knows ∇²_p G. For G = KL(p‖π_θ) that is `Gibbs`. On
particles ν is a charge c_j on each point y_j.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives import FirstVariation, GibbsObjective
from implicit_diffusion.objectives.variation import Support
from implicit_diffusion.particles import Particles
from implicit_diffusion.showing import Shown

Terms = Sequence[tuple[float, GibbsObjective]]


@dataclass(frozen=True, repr=False)
class AdjointMeasure(Shown):
    """ν, a signed measure of total mass zero: a charge on every point.

    Args:
        on_particles: charges of the particles, with shape (n,).
        on_points: charges of the points that the term's `draw` returned, with shape (m,); None where they carry none.
    """

    on_particles: Float[Tensor, " n"]
    on_points: Float[Tensor, " m"] | None = None


class AdjointSolver(ABC):
    """Solves (∇²_p G) ν = −F′ on measures of mass zero, for one kind of inner problem G; linear in F′.

    `supports` lists the measures F′·p that it has a solution for, by where they lie (`GibbsObjective.support`): a
    linear solve on the particles needs F′ as a function of them, ("particles",). "none" among them says that the
    gradient of min_p G(p, θ) is that of E_p V_θ, as it is for laws e^{−V_θ}/Z (`GibbsObjective.in_minimum`).

    `separable` says that the solver needs no more of other particles than sums, which it takes over all processes: then
    it is given what each process has. Otherwise it is given the particles and the points of all of them.
    """

    separable: ClassVar[bool] = False
    supports: ClassVar[tuple[Support, ...]] = ("particles", "points", "both")

    @abstractmethod
    def __call__(self, variation: FirstVariation, particles: Particles) -> AdjointMeasure:
        """The adjoint measure of a term.

        Args:
            variation: the measure F′·p of the term.
            particles: p.
        """

    def solve(self, variation: FirstVariation, particles: Particles, name: str) -> AdjointMeasure:
        """The same for the term of this name, whose last solution a solver may begin with."""
        return self(variation, particles)

    def shared(self, variation: FirstVariation, own: Particles, name: str = "") -> AdjointMeasure:
        """The adjoint measure where particles are shared out over processes: at this process's, and its part on points.

        Args:
            variation: at this process's particles and, unless the solver is separable, on all points, by 1/W each.
            own: this process's share of p.
            name: of the term.
        """
        if self.separable or processes.count() == 1:
            return self.solve(variation, own, name)
        whole, W, on_points = own.whole(), processes.count(), variation.on_points
        function = None if variation.function is None else processes.gathered(variation.function)
        on_points = None if on_points is None else on_points * W
        with processes.alone():
            measure = self.solve(replace(variation, function=function, on_points=on_points), whole, name)
        on_points = None if measure.on_points is None else measure.on_points / W
        return AdjointMeasure(processes.share(measure.on_particles), on_points)

    def check(self, terms: Terms) -> None:
        """Raise `InvalidInputError` for a term whose measure lies where the solver has no solution for it."""
        for _, term in terms:
            if term.in_minimum and "none" not in self.supports:
                raise InvalidInputError(
                    f"{term.name} depends on the least value of the inner problem, and {type(self).__name__} does not "
                    "differentiate it; that is defined for a potential V, whose law is e^{−V}/Z"
                )
            if term.support not in self.supports:
                raise InvalidInputError(
                    f"{type(self).__name__} needs F′ as a function on the particles, but {term.name} is a measure on "
                    "points outside of them; use an objective that compares samples, such as MMD or Sinkhorn"
                )

    def same_charges(self, terms: Terms) -> bool:
        """Whether particles of uniform weights all carry the same charge, wherever they are."""
        return False

    def take_info(self) -> dict[str, float]:
        """Metrics of the solves since the last call; nothing by default."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the next solve begins with; empty by default. A solver that has a state serves one loop."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        return
