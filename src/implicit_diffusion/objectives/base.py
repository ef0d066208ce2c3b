"""The algebra of objectives.

An objective is a weighted sum of terms, F = Σ_j c_j F_j, and is minimised. Terms come in three kinds:

- a `TerminalObjective` is a functional of points alone (a reward, a divergence to data), at the end of a chain or under
  the stationary law of a potential;
- a `GibbsObjective` needs the density e^{−V} behind the particles (the KL divergences), so it has no place on chains;
- a `RunningCost` is paid along a denoising chain, Σ_k E c_k(x_k, θ) (a path KL), so it has no place elsewhere.

`Reward(r) + 0.5 * PathKL()` composes them; the estimators of ∇F look only at `terms`.

Under a stationary law π_θ ∝ e^{−V} an objective is the signed measure ν = −(F′ − E_p F′)·p that it puts on points, and
∇F(π_θ) = ∇_θ ∫ V_θ dν: see `Charges`, and `implicit_diffusion.gradients.gibbs` for the derivation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, SupportsFloat

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_number, check_type, shown
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.function_checks import BY_TORCH, check_slope
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import exact
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.table import ChainTable
from implicit_diffusion.tables.transition import Transition


@dataclass(frozen=True, repr=False)
class Charges(Shown):
    """The signed measure ν that an objective puts on points, of total mass zero.

    Args:
        particles: on the particles, with shape (n,).
        on_points: on the points that `draw` returned, with shape (m,); None where there are none.
        value: F where the particles tell it; None where they do not.
    """

    particles: Float[Tensor, " n"]
    on_points: Float[Tensor, " m"] | None = None
    value: Float[Tensor, ""] | None = None


class Objective:
    """F = Σ_j c_j F_j: a sum of terms, each with a finite coefficient.

    Args:
        terms: pairs (coefficient, term).

    Raises:
        InvalidInputError: a weight that is no finite number, terms of one name, or what is no term.
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
        """Pairs (coefficient, term)."""
        return self._terms

    @property
    def terminal(self) -> list[tuple[float, TerminalObjective]]:
        """The terms that points alone decide."""
        return [(c, term) for c, term in self.terms if isinstance(term, TerminalObjective)]

    @property
    def stationary(self) -> list[tuple[float, GibbsObjective]]:
        """The terms that make sense under a stationary law, but for those of weight zero."""
        return [(c, term) for c, term in self.terms if isinstance(term, GibbsObjective) and c != 0]

    @property
    def running(self) -> list[tuple[float, RunningCost]]:
        """The terms paid on every row, but for those of weight zero."""
        return [(c, term) for c, term in self.terms if isinstance(term, RunningCost) and c != 0]

    def __add__(self, other: Objective) -> Objective:
        check_type("what is added to an objective", other, Objective, "a reward function becomes one by Reward(f)")
        return Objective(self.terms + other.terms)

    def __radd__(self, other: Literal[0]) -> Objective:
        return self if isinstance(other, int) and other == 0 else self + other  # `sum` begins with 0

    def __neg__(self) -> Objective:
        return -1.0 * self

    def __sub__(self, other: Objective) -> Objective:
        check_type("what is taken from an objective", other, Objective, "a reward function becomes one by Reward(f)")
        return self + -other

    def __mul__(self, factor: SupportsFloat) -> Objective:
        check_type("the weight of an objective", factor, SupportsFloat, "weights are numbers")
        factor = check_number("the weight of an objective", factor)
        return Objective(tuple((factor * c, term) for c, term in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> Objective:
        check_type("the divisor of an objective", divisor, SupportsFloat, "weights are numbers")
        divisor = check_number("the divisor of an objective", divisor)
        if divisor == 0:
            raise InvalidInputError("the divisor of an objective must not be 0")
        return (1 / divisor) * self

    def weight(self, kind: type[Term]) -> float:
        """Total coefficient of the terms of a kind; 0 where there is none."""
        _check_kind(kind)
        return sum((c for c, term in self.terms if isinstance(term, kind)), start=0.0)

    def with_weight(self, kind: type[Term], weight: float) -> Objective:
        """The same objective with another coefficient on the terms of a kind (a KL weight under adaptation)."""
        _check_kind(kind)
        return Objective(tuple((weight if isinstance(term, kind) else c, term) for c, term in self.terms))

    def evaluating(self) -> AbstractContextManager[None]:
        """Context in which networks that terms hold (a reward, U, a kernel) are deterministic functions (eval mode).

        Found among the attributes of the terms, as `frozen.modules_in` says; one that a plain function closes over is
        out of reach.
        """
        own = [term for _, term in self.terms if isinstance(term, nn.Module)]
        return eval_mode(*own, *(part for _, term in self.terms for part in vars(term).values()))

    def __repr__(self) -> str:
        return " + ".join(f"{c:g}·{term.name}" for c, term in self.terms)


class Term(Shown, Objective):
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


class GibbsObjective(Term, ABC):
    """A functional of the stationary law π_θ ∝ e^{−V(·; θ)}."""

    constant_charges: bool = False  # whether uniform particles are charged alike: one pull then serves sampler and Γ

    @abstractmethod
    def charges(
        self, particles: Particles, energy: Float[Tensor, " n"], points: Float[Tensor, "m *event"] | None
    ) -> Charges:
        """The measure ν of this term.

        Args:
            particles: p.
            energy: V at the particles.
            points: what `draw` returned.
        """

    def draw(self, generator: torch.Generator) -> Float[Tensor, "m *event"] | None:
        """The points besides the particles that one estimate of the gradient uses; None where there are none."""
        return None

    def estimate(
        self, charges: Charges, on_points: Float[Tensor, " m"] | None, log_z: Float[Tensor, ""] | None
    ) -> Float[Tensor, ""] | None:
        """F as far as it can be told.

        Args:
            charges: as returned by `charges`.
            on_points: V at the points.
            log_z: log ∫ e^{−V}, where weighted particles know it.
        """
        return charges.value

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        """Raise `InvalidInputError` where there are no charges on these particles."""


class TerminalObjective(GibbsObjective):
    """A functional of points alone."""

    @abstractmethod
    def value(self, particles: Particles) -> Float[Tensor, ""]:
        """F(p), differentiable in the particles' positions."""

    def first_variation(self, particles: Particles) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
        """F′(p) at the particles, defined up to a constant, and F(p).

        By autograd through the weights w = softmax(A): moving mass changes them alone, and ∂F/∂A_i = w_i (F′_i − E F′).
        """
        with torch.enable_grad():
            weights = particles.weights.detach()
            logs = weights.log().requires_grad_()
            value = self.value(Particles(particles.x, logs, condition=particles.condition))
            slope = None
            if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad:
                (slope,) = torch.autograd.grad(value, logs, allow_unused=True)
            if slope is None:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InvalidInputError(
                    f"{self.name} must be a 0-d tensor that depends on the particles' weights through torch "
                    f"operations, got {given}"
                )
        return torch.where(weights > 0, slope / weights, 0), value.detach()  # weights may underflow

    def charges(
        self, particles: Particles, energy: Float[Tensor, " n"], points: Float[Tensor, "m *event"] | None
    ) -> Charges:
        with torch.no_grad():
            variation, value = self.first_variation(particles)
            return Charges(centred(-variation, particles), value=value)

    def check(self, particles: Particles) -> None:
        """Try to differentiate the objective in the positions of a few samples.

        Raises:
            InvalidInputError: no 0-d tensor, or one that does not depend on the positions through torch operations.
        """
        x = particles.x.detach().clone().requires_grad_()
        with torch.enable_grad(), self.evaluating():
            value = self.value(Particles(x, condition=particles.condition))
        if not isinstance(value, Tensor) or value.ndim != 0:
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(f"{self.name} must be a 0-d tensor, got {given}")
        gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
        if gradient is None:
            raise InvalidInputError(
                f"{self.name} is not differentiable in the samples: its value does not depend on them through torch "
                f"operations; {BY_TORCH}, and without comparisons, or train a potential by Single, which needs no such "
                "derivative"
            )
        check_slope(self.name, gradient, value.detach())

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        found = self.charges(particles, energy, None).particles
        if not found.isfinite().all():
            raise InvalidInputError(f"the first variation of {self.name} is NaN or infinite on the initial particles")


class RunningCost(Term, ABC):
    """A cost paid on every row of a chain."""

    @abstractmethod
    def cost(self, transition: Transition) -> Float[Tensor, "slots batch"]:
        """c_k(x_k, θ) for every sample, differentiable in θ and x."""

    def check(self, table: ChainTable, trained_rows: tuple[int, ...]) -> None:
        """Raise `InvalidInputError` where the cost has no finite value on the trained rows."""


def centred(values: Float[Tensor, " n"], particles: Particles) -> Float[Tensor, " n"]:
    """w_i (values_i − mean)/(1 − Σ w²), of total zero: with uniform weights the factor is n/(n − 1), and a covariance
    with anything is unbiased for independent particles.
    """
    wide = exact(values)
    if particles.log_weights is None:
        return ((wide - wide.mean()) * (1 / (len(values) - 1))).to(values.dtype)
    w = torch.softmax(exact(particles.log_weights), 0)
    return (w * (wide - w @ wide) / (1 - w.square().sum())).to(values.dtype)


def check_name(name: object) -> str:
    """The name of a term, which metrics and files report it by."""
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"name must be a word under which metrics report the term, got {shown(name)}")
    return name


def _check_kind(kind: object) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise InvalidInputError(f"the kind of terms must be a class such as PathKL, got {shown(kind)}")
