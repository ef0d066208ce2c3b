"""The algebra of objectives.

An objective is a weighted sum of terms, F = Σ_j c_j F_j, and is minimised. Terms come in two kinds:

- a `TerminalObjective` is a functional of the particles at the sampler's end (a reward, a divergence to data);
- a `RunningCost` is paid along a denoising chain, Σ_k E c_k(x_k, θ) (a path KL).

`Reward(r) + 0.5 * PathKL()` composes them; the estimators of ∇F look only at `terms`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.denoisers.table import ChainTable
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.particles import Particles
from implicit_diffusion.transition import Transition


class Objective:
    """F = Σ_j c_j F_j: a sum of terms, each with a finite coefficient."""

    def __init__(self, terms: tuple[tuple[float, Term], ...]) -> None:
        for coefficient, term in terms:
            if not math.isfinite(coefficient):
                raise InvalidInputError(f"the weight of {term.name} must be finite, got {coefficient}")
        names = [term.name for _, term in terms]
        if len(set(names)) < len(names):
            raise InvalidInputError(f"terms of an objective need different names, got {names}; pass name=... to one")
        self._terms = terms

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        """Pairs (coefficient, term)."""
        return self._terms

    @property
    def terminal(self) -> list[tuple[float, TerminalObjective]]:
        """The terms paid at the end."""
        return [(c, term) for c, term in self.terms if isinstance(term, TerminalObjective)]

    @property
    def running(self) -> list[tuple[float, RunningCost]]:
        """The terms paid on every row, but for those of weight zero."""
        return [(c, term) for c, term in self.terms if isinstance(term, RunningCost) and c != 0]

    def __add__(self, other: Objective) -> Objective:
        return Objective(self.terms + other.terms)

    def __mul__(self, factor: float) -> Objective:
        return Objective(tuple((factor * c, term) for c, term in self.terms))

    __rmul__ = __mul__

    def weight(self, kind: type[Term]) -> float:
        """Total coefficient of the terms of a kind; 0 where there is none."""
        return sum((c for c, term in self.terms if isinstance(term, kind)), start=0.0)

    def with_weight(self, kind: type[Term], weight: float) -> Objective:
        """The same objective with another coefficient on the terms of a kind (a KL weight under adaptation)."""
        return Objective(tuple((weight if isinstance(term, kind) else c, term) for c, term in self.terms))

    def __repr__(self) -> str:
        return " + ".join(f"{c:g}·{term.name}" for c, term in self.terms)


class Term(Objective):
    """A single term, which is itself an objective with coefficient one."""

    name: str

    def __init__(self) -> None:
        pass

    @property
    def terms(self) -> tuple[tuple[float, Term], ...]:
        return ((1.0, self),)

    def report(self, value: Float[Tensor, ""]) -> tuple[str, Tensor]:
        """Name and number under which the value appears in metrics."""
        return self.name, value


class TerminalObjective(Term, ABC):
    """A functional of the particles at the sampler's end."""

    @abstractmethod
    def value(self, particles: Particles) -> Float[Tensor, ""]:
        """F(p), differentiable in the particles' positions."""

    def check(self, particles: Particles) -> None:
        """Raise `InvalidInputError` where the objective cannot be differentiated at these particles."""


class RunningCost(Term, ABC):
    """A cost paid on every row of a chain."""

    @abstractmethod
    def cost(self, transition: Transition) -> Float[Tensor, "slots batch"]:
        """c_k(x_k, θ) for every sample, differentiable in θ and x."""

    def check(self, table: ChainTable, trained_rows: tuple[int, ...]) -> None:
        """Raise `InvalidInputError` where the cost has no finite value on the trained rows."""
