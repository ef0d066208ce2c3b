"""The algebra of objectives, and the three kinds of terms that it combines.

An objective is a weighted sum of terms, F = Σ_j c_j F_j, and is minimised. Terms come in three kinds:

- a `TerminalObjective` is a functional of points alone (a reward, a divergence to data), at the end of a chain or under
  the stationary law of a potential;
- a `GibbsObjective` may need the density e^{−V} behind the particles (the KL divergences do), which chains have not;
- a `RunningCost` is paid along a denoising chain, Σ_k E c_k(x_k, θ) (a path KL), which stationary samplers do not have.

`Reward(r) + 0.5 * PathKL()` is a `Sum`; a term is an objective by itself. Gradient estimators look only at `terms`. No
check or estimate changes an objective, so that several loops may share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import ClassVar, Literal, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_number, check_type, shown
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.objectives import by_autograd
from implicit_diffusion.objectives.variation import Density, FirstVariation, Support
from implicit_diffusion.particles import Particles
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.table import ChainTable
from implicit_diffusion.tables.transition import Transition

FUNCTIONS = "a reward function becomes one by Reward(f)"


class Objective(ABC):
    """F = Σ_j c_j F_j, a functional of distributions that is minimised: a `Sum`, or a single `Term`."""

    @property
    @abstractmethod
    def terms(self) -> tuple[tuple[float, Term], ...]:
        """Pairs (coefficient, term)."""

    @property
    def terminal(self) -> list[tuple[float, TerminalObjective]]:
        """The terms that points alone determine."""
        return [(c, term) for c, term in self.terms if isinstance(term, TerminalObjective)]

    @property
    def stationary(self) -> list[tuple[float, GibbsObjective]]:
        """The terms that are defined under a stationary law, except those of weight zero."""
        return [(c, term) for c, term in self.terms if isinstance(term, GibbsObjective) and c != 0]

    @property
    def running(self) -> list[tuple[float, RunningCost]]:
        """The terms paid on every row of a chain, except those of weight zero."""
        return [(c, term) for c, term in self.terms if isinstance(term, RunningCost) and c != 0]

    def __add__(self, other: Objective) -> Objective:
        check_type("what is added to an objective", other, Objective, FUNCTIONS)
        return Sum(self.terms + other.terms)

    def __radd__(self, other: Literal[0]) -> Objective:
        return self if isinstance(other, int) and other == 0 else self + other  # `sum` begins with 0

    def __neg__(self) -> Objective:
        return -1.0 * self

    def __sub__(self, other: Objective) -> Objective:
        check_type("what is subtracted from an objective", other, Objective, FUNCTIONS)
        return self + -other

    def __mul__(self, factor: SupportsFloat) -> Objective:
        check_type("the weight of an objective", factor, SupportsFloat, "weights are numbers")
        factor = check_number("the weight of an objective", factor)
        return Sum(tuple((factor * c, term) for c, term in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> Objective:
        check_type("the divisor of an objective", divisor, SupportsFloat, "weights are numbers")
        divisor = check_number("the divisor of an objective", divisor)
        if divisor == 0:
            raise InvalidInputError("the divisor of an objective must not be 0")
        return (1 / divisor) * self

    def weight(self, kind: type[Term]) -> float:
        """Total coefficient of the terms of a kind; 0 where there are none."""
        _check_kind(kind)
        return sum((c for c, term in self.terms if isinstance(term, kind)), start=0.0)

    def with_weight(self, kind: type[Term], weight: float) -> Objective:
        """The same objective with another coefficient on the terms of a kind (a KL weight under adaptation)."""
        _check_kind(kind)
        return Sum(tuple((weight if isinstance(term, kind) else c, term) for c, term in self.terms))

    def starting_at(self, particles: Particles, energy: Float[Tensor, " n"]) -> Objective:
        """This objective for a loop over particles that starts at these; see `GibbsObjective.starting_at`.

        Args:
            particles: X_0.
            energy: V at the particles, with shape (n,), under the initial θ.
        """

        def started(c: float, term: Term) -> Term:
            return term.starting_at(particles, energy) if isinstance(term, GibbsObjective) and c != 0 else term

        terms = tuple((c, started(c, term)) for c, term in self.terms)
        return self if all(new is old for (_, new), (_, old) in zip(terms, self.terms, strict=True)) else Sum(terms)

    def evaluating(self) -> AbstractContextManager[None]:
        """Context in which the `networks` of all terms are deterministic functions (eval mode)."""
        return eval_mode(*(network for _, term in self.terms for network in term.networks()))

    def __repr__(self) -> str:
        return " + ".join(f"{c:g}·{term.name}" for c, term in self.terms)


class Sum(Objective):
    """A sum of terms, each with a finite coefficient; `+` and `*` make them.

    Args:
        terms: pairs (coefficient, term).

    Raises:
        InvalidInputError: a coefficient that is not a finite number, two terms of one name, or something other than
            terms.
    """

    def __init__(self, terms: tuple[tuple[float, Term], ...]) -> None:
        pairs = isinstance(terms, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in terms)
        if not pairs or not all(isinstance(term, Term) for _, term in terms):
            raise InvalidInputError(
                f"terms must be pairs (weight, term), got {shown(terms)}; Reward(f) + 0.1 * PathKL() makes them"
            )
        terms = tuple((check_number(f"the weight of {term.name}", c), term) for c, term in terms)
        names = [term.name for _, term in terms]
        if len(set(names)) < len(names):
            raise InvalidInputError(f"terms of an objective need different names, got {names}; pass name=... to one")
        self._terms = terms

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return self._terms


class Term(Shown, Objective):
    """A single term, which is itself an objective with coefficient one."""

    name: str

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    def networks(self) -> Iterable[nn.Module]:
        """The modules that the term calls, which loops and estimators put into eval mode while they run.

        A term of your own returns its network here; by default there is none, except a term that is itself a module.
        """
        return [self] if isinstance(self, nn.Module) else []

    def report(self, value: Float[Tensor, "*runs"]) -> tuple[str, Tensor]:
        """Name and number under which the value appears in metrics."""
        return self.name, value


class GibbsObjective(Term):
    """A functional of the stationary law π_θ ∝ e^{−V(·; θ)}, known by its first variation.

    `support` is where the measure F′·p lies, known before anything is evaluated: on the "particles" alone, F′ being a
    function of them; on outside "points" alone, which `draw` returns; or on "both"; "none" where F′ = 0. `in_minimum`
    is the derivative of F in the value min_p G(p, θ) = −log Z_θ of the inner problem, 1 for the evidence.

    `separable` says that the term looks at each particle by itself and averages with `Particles.mean`: then every
    process evaluates it at its own particles and points; otherwise at those of all.
    """

    support: ClassVar[Support] = "particles"
    separable: ClassVar[bool] = False
    in_minimum: ClassVar[float] = 0.0

    @abstractmethod
    def first_variation(self, particles: Particles, density: Density) -> FirstVariation:
        """The signed measure F′(p)·p, and F(p) where it is known.

        Args:
            particles: p.
            density: V at the particles and at the points that `draw` returned.
        """

    def shared_variation(self, own: Particles, density: Density) -> FirstVariation:
        """`first_variation` where particles are shared out over processes: F′ at this process's, and F(p).

        The measure on points is this process's part of it: the sum over processes is all of it.

        Args:
            own: this process's share of p.
            density: V at these, and at the points that `draw` returned; at all of them, unless the term is separable.
        """
        if self.separable or processes.count() == 1:
            return self.first_variation(own, density)
        whole, energy = own.whole(), processes.gathered(density.energy)
        with processes.alone():
            variation = self.first_variation(whole, replace(density, energy=energy))
        function, on_points = variation.function, variation.on_points
        function = None if function is None else processes.share(function)
        on_points = None if on_points is None else on_points / processes.count()
        return replace(variation, function=function, on_points=on_points)

    def draw(self, generator: torch.Generator) -> Float[Tensor, "m *event"] | None:
        """The points outside the particles that one estimate of the gradient uses; None where there are none."""
        return None

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        """Try the objective on the initial particles of a loop.

        Args:
            particles: X_0.
            energy: V at the particles, with shape (n,).

        Raises:
            InvalidInputError: it has no finite first variation there.
        """

    def starting_at(self, particles: Particles, energy: Float[Tensor, " n"]) -> GibbsObjective:
        """The term that a loop holds which starts at these particles: itself, unless it compares π_θ with the start."""
        return self


class TerminalObjective(GibbsObjective):
    """A functional of points alone."""

    @abstractmethod
    def value(self, particles: Particles) -> Float[Tensor, ""]:
        """F(p), differentiable in the particles' positions."""

    def shared_value(self, own: Particles) -> Float[Tensor, ""]:
        """`value` where particles are shared out over processes: F(p), differentiable in this process's positions.

        Args:
            own: this process's share of p.
        """
        if self.separable or processes.count() == 1:
            return self.value(own)
        whole = own.whole()
        with processes.alone():
            return self.value(whole)

    def first_variation(self, particles: Particles, density: Density | None = None) -> FirstVariation:
        """F′(p) at the particles and F(p); by autograd through the weights, unless a term overrides it."""
        function, value = by_autograd.first_variation(self.name, self.value, particles)
        return FirstVariation(function, value=value)

    def check_value(self, particles: Particles) -> None:
        """Try the objective on a few samples without a gradient: all that may be asked of a black box.

        Raises:
            InvalidInputError: something other than a 0-d tensor, NaN or infinity.
        """
        with torch.no_grad(), self.evaluating():
            value = self.value(Particles(particles.x.detach().clone(), condition=particles.condition))
        by_autograd.check_finite_scalar(self.name, value)

    def check_slope(self, particles: Particles) -> None:
        """Try to differentiate the objective in the positions of a few samples.

        Raises:
            InvalidInputError: something other than a 0-d tensor, or one that does not depend on the positions through
                torch operations.
        """
        x = particles.x.detach().clone().requires_grad_()
        with torch.enable_grad(), self.evaluating():
            by_autograd.check_differentiable(self.name, self.value(Particles(x, condition=particles.condition)), x)

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        variation = self.first_variation(particles, Density(energy)).function
        if variation is None or not variation.isfinite().all():
            raise InvalidInputError(
                f"the first variation of {self.name} is NaN or infinite on the initial particles; it must be finite"
            )


class RunningCost(Term):
    """A cost paid on every row of a chain."""

    @abstractmethod
    def cost(self, transition: Transition) -> Float[Tensor, "slots batch"]:
        """c_k(x_k, θ) for every sample, differentiable in θ and x."""

    def check(self, table: ChainTable, trained_rows: tuple[int, ...]) -> None:
        """Raise `InvalidInputError` where the cost has no finite value on the trained rows."""


def _check_kind(kind: object) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise InvalidInputError(f"the kind of terms must be a class such as PathKL, got {shown(kind)}")
