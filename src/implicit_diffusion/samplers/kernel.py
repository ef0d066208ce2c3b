"""The contract of a stationary sampler: a Markov kernel that leaves π_θ ∝ e^{−V(·; θ)} (nearly) invariant.

A kernel keeps no state of its own. Its `move` is a function of one `Step`, which holds the particles, V and ∇V there
(the caller needs them as well), and all random numbers. It returns the `State` that the next step continues from, apart
from the `Info` that diagnoses this one.

**Weights while θ moves.** Particles that make one step per update of θ lag behind π_θ. Every kernel with
`weighted = True` knows the increments that make weighted averages exact along any path of θ fixed in advance
(Jarzynski's equality; Neal, *Annealed Importance Sampling*, arXiv physics/9803008):

    A_{k+1} = A_k + forward_k − backward_{k+1},       E_{π_{θ_k}} φ = E[φ(X_k) e^{A_k}] / E[e^{A_k}]

The forward part is known at the end of a step under θ_k. The backward part needs V and ∇V at the new particles under
θ_{k+1}, which the next step computes anyway: weights cost no evaluation of V.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_call, check_number, trying
from implicit_diffusion.potentials.energy import Energy, energy_of
from implicit_diffusion.samplers.draws import normals
from implicit_diffusion.showing import Shown, named, of_tuple

StepSize = float | Callable[[int], float]


class State(NamedTuple):
    """Where a step leaves the particles: what the next step continues from.

    Args:
        x: the particles, with shape (n, *event).
        momentum: as `x`; None for kernels without.
        value: V at x under the θ of the step, with shape (n,), where the kernel has computed it; None elsewhere.
    """

    x: Tensor
    momentum: Tensor | None = None
    value: Tensor | None = None

    def __repr__(self) -> str:
        return of_tuple(self)


class Info(NamedTuple):
    """Diagnostics of a step; nothing continues from them.

    Args:
        acceptance: the probability that each proposal had of being accepted, with shape (n,); None for kernels that
            do not reject.
    """

    acceptance: Tensor | None = None

    def __repr__(self) -> str:
        return of_tuple(self)


class Step(NamedTuple):
    """All that one step of a kernel depends on.

    Args:
        x: the particles, with shape (n, *event).
        momentum: as the last `State` left it; None for kernels without.
        here: V and ∇V at x, under the present θ.
        energy: computes V and ∇V anywhere else, under the same θ.
        draws: this step's random numbers, see `Kernel.draws`.
        h: the step size, a 0-d tensor.
    """

    x: Tensor
    momentum: Tensor | None
    here: Energy
    energy: Callable[[Tensor], Energy]
    draws: tuple[Tensor, ...]
    h: Tensor

    def __repr__(self) -> str:
        return of_tuple(self)


class Kernel(Shown, ABC):
    """One step of a sampler. A kernel has a step size and a `move`; one that knows increments has both parts of them.

    Args:
        step_size: h > 0, or a function k ↦ h_k of the iteration k = 0, 1, … (`power_law`).

    Attributes:
        weighted: whether the kernel knows the increments of weights, `forward_part` and `backward_part`.
        weighs_by_gradient: whether the backward part depends on ∇V, and not on V alone.
        evaluations_per_step: how often a step evaluates ∇V at all particles, the evaluation in `Step.here` included.
        target_acceptance: the mean acceptance that `warm_up` tunes the step size to; None for kernels that do not
            reject.

    Raises:
        InvalidInputError: a step size that is not positive and finite.
    """

    weighted: bool = False
    weighs_by_gradient: bool = True
    evaluations_per_step: int = 1
    target_acceptance: float | None = None

    def __init__(self, step_size: StepSize) -> None:
        if callable(step_size):
            check_call("step_size", step_size, "k")
        self.step_size = step_size
        with trying("step_size", "iteration 0"):
            self.step_size_at(0)

    def step_size_at(self, k: int) -> float:
        """h_k.

        Raises:
            InvalidInputError: a schedule whose value is not positive and finite.
        """
        h = self.step_size(k) if callable(self.step_size) else self.step_size
        if type(h) is float and 0 < h < math.inf:  # in every iteration
            return h
        return check_number("step_size", h, 0.0, note=f" for iteration {k}")

    def reach(self, h: float) -> float:
        """About how far one addition moves a coordinate of a particle, for a V whose length scale is at least one."""
        return math.sqrt(2 * h)

    def start(self, x: Float[Tensor, "n *event"], generator: torch.Generator) -> State:
        """The particles as a state to begin from; kernels with a momentum draw it."""
        return State(x)

    def draws(self, generator: torch.Generator, count: int, x: Float[Tensor, "n *event"]) -> tuple[Tensor, ...]:
        """The random numbers of `count` steps, each tensor with leading dimension `count`; here N(0, 1) as x.

        They depend on the shape, dtype and device of x alone. A tensor with shape (count, n, …) holds one row for each
        particle, and one of another shape what all of them have in common: processes that share the particles draw the
        numbers of all, and keep the rows of their own.
        """
        return (normals(generator, count, x),)

    def prepare(
        self, potential: Callable[[Tensor], Tensor], state: State, generator: torch.Generator, k: int = 0
    ) -> Step:
        """The step of iteration k: V and ∇V at the particles, the step size h_k and fresh random numbers.

        Args:
            potential: V, (n, *event) → (n,); a module with dropout or batch normalisation in evaluation mode.
            state: where the particles are.
            generator: source of the random numbers.
            k: the iteration, which a schedule of step sizes needs.
        """
        draws = tuple(numbers[0] for numbers in self.draws(generator, 1, state.x))
        here, h = energy_of(potential, state.x), state.x.new_tensor(self.step_size_at(k))
        return Step(state.x, state.momentum, here, lambda y: energy_of(potential, y), draws, h)

    @abstractmethod
    def move(self, step: Step) -> tuple[State, Info]:
        """Move the particles once."""

    def forward_part(self, step: Step, after: State) -> Float[Tensor, " n"]:
        """The part of the weights' increment that the θ of the step decides.

        In the widest dtype (`rounding.exact`): it may share a large constant with the backward part.

        Args:
            step: as it was made.
            after: where it left the particles.
        """
        raise InvalidInputError(self._no_weights())

    def backward_part(
        self, before: Float[Tensor, "n *event"], x: Float[Tensor, "n *event"], here: Energy, h: Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        """The part that is subtracted once the next θ is known, in the widest dtype.

        Args:
            before: the particles before the step.
            x: the particles after it.
            here: V and ∇V at x under the next θ.
            h: the step size that the step was made with.
        """
        raise InvalidInputError(self._no_weights())

    def _no_weights(self) -> str:
        return f"{type(self).__name__} has no increment of weights; use ULA, MALA or HMC"


def inner_product(a: Float[Tensor, "n *event"], b: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
    """⟨a_i, b_i⟩ of every particle."""
    return (a * b).flatten(1).sum(1)


def power_law(scale: float, exponent: float) -> Callable[[int], float]:
    """The schedule k ↦ scale · (k + 1)^{−exponent}, k = 0, 1, …

    The paper's discrete rates have h_k = c k^{−1/3} and η_k = h_k k^{−1/3}: use `power_law(c, 1/3)` for the sampler and
    `power_law(c, 2/3)` for θ, with `torch.optim.lr_scheduler.LambdaLR`, which multiplies: begin with lr=1.

    Raises:
        InvalidInputError: a scale that is not positive, or an exponent that is not finite.
    """
    scale, exponent = check_number("scale", scale, 0.0), check_number("exponent", exponent)
    return named(lambda k: scale * (k + 1) ** -exponent, f"power_law({scale:g}, {exponent:.3g})")
