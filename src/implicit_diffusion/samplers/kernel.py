"""What a stationary sampler is: a Markov kernel that leaves π_θ ∝ e^{−V(·; θ)} (nearly) invariant.

A kernel moves particles by one step and keeps no state of its own. It is handed V and ∇V at the particles, which the
caller needs as well, and all its random numbers, which are drawn elsewhere; so a step is a plain function of tensors.

**Weights while θ moves.** Particles that make one step per update of θ lag behind π_θ. Every kernel with
`weighted = True` knows the increments that make weighted averages exact along any path of θ fixed in advance
(Jarzynski's equality; Neal's annealed importance sampling, arXiv physics/9803008):

    A_{k+1} = A_k + debt_k − repay_{k+1},       E_{π_{θ_k}} φ = E[φ(X_k) e^{A_k}] / E[e^{A_k}]

`debt` is known at the end of a step under θ_k. `repay` needs V and ∇V at the new particles under θ_{k+1}, which the
next step computes anyway: weights cost no evaluation of V.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_call, check_number, trying
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.rounding import exact
from implicit_diffusion.showing import Shown, named, of_tuple

Schedule = float | Callable[[int], float]
BLOCK = 2**17  # numbers drawn at once: several steps of few particles, one of many


class Move(NamedTuple):
    """One step taken.

    Args:
        x: the new particles, with shape (n, *event).
        momentum: for the next step, as `x`; None for kernels without.
        energy: V at the new particles under the step's θ, with shape (n,), where it is known; None elsewhere.
        acceptance: probability that each proposal had, with shape (n,); None for kernels that do not reject.
    """

    x: Tensor
    momentum: Tensor | None = None
    energy: Tensor | None = None
    acceptance: Tensor | None = None

    def __repr__(self) -> str:
        return of_tuple(self)


class Kernel(Shown, ABC):
    """A sampler's step.

    Args:
        step_size: h > 0, or a function k ↦ h_k of the iteration k = 0, 1, … (`power_law`).

    Raises:
        InvalidInputError: a step size that is not positive and finite.
    """

    weighted: bool = True  # whether increments of weights are known
    evaluations: int = 1  # of ∇V per step, the one at the particles included
    target_acceptance: float | None = None  # what `warm_up` tunes the step size to

    def __init__(self, step_size: Schedule) -> None:
        if callable(step_size):
            check_call("step_size", step_size, "k")
        self.step_size = step_size
        with trying("step_size", "iteration 0"):
            self.step(0)

    def step(self, k: int) -> float:
        """h_k."""
        h = self.step_size(k) if callable(self.step_size) else self.step_size
        if type(h) is float and 0 < h < math.inf:  # in every iteration
            return h
        return check_number("step_size", h, 0.0, note=f" for iteration {k}")

    def reach(self, h: float) -> float:
        """How far one addition moves a coordinate of a particle, about, under V whose scale is one or more."""
        return math.sqrt(2 * h)

    def draws(self, generator: torch.Generator, count: int, x: Float[Tensor, "n *event"]) -> tuple[Tensor, ...]:
        """The random numbers of `count` steps: N(0, 1) with shape (count, n, *event); see `uniforms`."""
        return (normals(generator, count, x),)

    def momentum(self, generator: torch.Generator, x: Float[Tensor, "n *event"]) -> Tensor | None:
        """A first momentum; None for kernels without."""
        return None

    @abstractmethod
    def move(
        self,
        x: Float[Tensor, "n *event"],
        momentum: Tensor | None,
        here: Energy,
        energy: Callable[[Tensor], Energy],
        draws: tuple[Tensor, ...],
        h: Float[Tensor, ""],
    ) -> Move:
        """One step from x under the present θ.

        Args:
            x: particles.
            momentum: as the last `Move` left it.
            here: V and ∇V at x.
            energy: V and ∇V anywhere else.
            draws: this step's part of `draws`.
            h: step size.
        """

    @abstractmethod
    def owe(self, x: Float[Tensor, "n *event"], here: Energy, move: Move, h: Float[Tensor, ""]) -> Float[Tensor, " n"]:
        """The `debt` of a move from x: the part of the increment that the step's own θ, that of `here`, decides.

        In the widest dtype (`exact`): V may share a large constant with what is repaid.
        """

    @abstractmethod
    def repay(
        self, previous: Float[Tensor, "n *event"], x: Float[Tensor, "n *event"], here: Energy, h: Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        """What closes the increment of the step previous → x (taken with step size h) under the θ of `here`."""


class ExactKernel(Kernel):
    """A kernel that leaves π_θ itself invariant: the weights change with θ at fixed x, A += V_θ(x) − V_θ′(x)."""

    def owe(self, x: Float[Tensor, "n *event"], here: Energy, move: Move, h: Float[Tensor, ""]) -> Float[Tensor, " n"]:
        assert move.energy is not None
        return exact(move.energy)

    def repay(
        self, previous: Float[Tensor, "n *event"], x: Float[Tensor, "n *event"], here: Energy, h: Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        return exact(here.value)

    def draws(self, generator: torch.Generator, count: int, x: Float[Tensor, "n *event"]) -> tuple[Tensor, ...]:
        """N(0, 1) with shape (count, n, *event) and U(0, 1) with shape (count, n)."""
        uniform = torch.rand((count, len(x)), generator=generator, device=x.device, dtype=x.dtype)
        return normals(generator, count, x), uniform


CHECKED = 1024  # iterations from one look at the spacing of numbers to the next: a look waits for the device


def check_resolved(kernel: Kernel, x: Float[Tensor, "n *event"], k: int) -> None:
    """Notice steps that the particles' dtype rounds away, now and then.

    Sums of a particle and its step are rounded by up to half a spacing u of the numbers there, which adds a variance of
    u²/12 to that of the step. It may be one per cent of that at most, for coordinates as large as they are on average.

    Raises:
        InvalidInputError: at the first iteration, k = 0; later it warns.
    """
    if k % CHECKED:
        return
    size = float(x.detach().abs().mean(0).amax())
    reach = kernel.reach(kernel.step(k))
    spacing = torch.finfo(x.dtype).eps * 2.0 ** (math.frexp(size)[1] - 1) if math.isfinite(size) else 0.0
    if spacing**2 / 12 <= 0.01 * reach * reach:
        return
    message = (
        f"steps of {type(kernel).__name__} move particles by about {reach:.1g}, but {x.dtype} numbers as large as "
        f"{size:.2g} are {spacing:.1g} apart, so that steps are rounded away; shift the data towards zero (subtract "
        "their mean), take a larger step size, or particles and potential in a wider dtype"
    )
    if k == 0:
        raise InvalidInputError(message)
    warnings.warn(message, stacklevel=3)


def metropolis(
    log_ratio: Float[Tensor, " n"],
    uniform: Float[Tensor, " n"],
    old: tuple[Float[Tensor, "n *event"], Float[Tensor, " n"]],
    new: tuple[Float[Tensor, "n *event"], Float[Tensor, " n"]],
) -> Move:
    """Accept new = (x, V) with probability min(1, e^{log_ratio}), keep old elsewhere."""
    log_ratio = log_ratio.to(new[1].dtype)
    accept = uniform < log_ratio.exp()  # NaN is not accepted
    chosen = accept.view(-1, *[1] * (old[0].ndim - 1))
    x = torch.where(chosen, new[0], old[0])
    return Move(x, None, torch.where(accept, new[1], old[1]), log_ratio.exp().clamp(max=1).nan_to_num(0.0))


def inner(a: Float[Tensor, "n *event"], b: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
    """⟨a_i, b_i⟩ of every particle."""
    return (a * b).flatten(1).sum(1)


def power_law(scale: float, exponent: float) -> Callable[[int], float]:
    """The schedule k ↦ scale · (k + 1)^{−exponent}, k = 0, 1, …

    The paper's discrete rates have h_k = c k^{−1/3} and η_k = h_k k^{−1/3}: `power_law(c, 1/3)` for the sampler and
    `power_law(c, 2/3)` for θ, by `torch.optim.lr_scheduler.LambdaLR`, which multiplies: begin with lr=1.

    Raises:
        InvalidInputError: a scale that is not positive, or an exponent that is not finite.
    """
    scale, exponent = check_number("scale", scale, 0.0), check_number("exponent", exponent)
    return named(lambda k: scale * (k + 1) ** -exponent, f"power_law({scale:g}, {exponent:.3g})")


def short(x: Tensor) -> bool:
    """Whether x holds vectors so short that loops over their coordinates do not vectorise."""
    return x.ndim == 2 and x.shape[1] <= 16


def innermost(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers; short vectors are laid out with the particles innermost, which does vectorise."""
    return x.mT.contiguous().mT if short(x) else x.contiguous()


def normals(generator: torch.Generator, count: int, x: Tensor) -> Tensor:
    """N(0, 1) with shape (count, *x.shape), for short vectors with the particles innermost.

    The numbers depend on the shape of x alone, not on its layout in memory: a resumed run draws the same.
    """
    if short(x):
        shape = (count, x.shape[1], x.shape[0])
        return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype).mT
    return torch.randn((count, *x.shape), generator=generator, device=x.device, dtype=x.dtype)
