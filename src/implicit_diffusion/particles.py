"""Particles: the empirical distribution Σ_i w_i δ_{x_i} that a sampler holds and an objective reads.

Where samples are shared out over processes, `Particles` hold one process's share of the distribution: positions,
weights and conditions are those of its own particles; log-weights, means and effective sizes are those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_type, shown
from implicit_diffusion.rounding import at_least_single
from implicit_diffusion.showing import Shown, brief, of_kind, with_error

FEW_COORDINATES = 3  # coordinates up to which `repr` shows means


@dataclass(frozen=True, repr=False)
class Particles(Shown):
    """Points with weights that are positive and sum to one.

    Args:
        x: positions, with shape (n, *event).
        log_weights: unnormalised log-weights, with shape (n,), of the particles of all processes; uniform weights where
            None.
        log_z: log ∫ e^{−V} of the law that they represent, if it is known.
        log_z_growth: growth of log Z since their loop began, which weights estimate even where log Z is unknown.
        condition: what each was sampled under (class labels, prompts), tensors with leading dimension n; None without a
            condition.

    Raises:
        InvalidInputError: `x` is not a tensor, or has no particles; log-weights do not have shape (n,).
    """

    x: Float[Tensor, "n *event"]
    log_weights: Float[Tensor, " all"] | None = None
    log_z: Float[Tensor, ""] | None = None
    log_z_growth: Float[Tensor, ""] | None = None
    condition: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        check_type("x", self.x, Tensor, "particles are a tensor of shape (n, *event)")
        if self.x.ndim < 1 or len(self.x) == 0:
            raise InvalidInputError(f"x must have shape (n, *event) with n ≥ 1, got {tuple(self.x.shape)}")
        if self.log_weights is not None:
            check_type("log_weights", self.log_weights, Tensor, "they are a tensor of shape (n,), or None")
            number = len(self.x) * processes.count()
            if self.log_weights.shape != (number,) or not self.log_weights.is_floating_point():
                raise InvalidInputError(
                    f"log_weights must be floating-point numbers of shape ({number},), one for each of the "
                    f"particles, got {shown(self.log_weights)}"
                )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """W = softmax(log_weights), with shape (n,)."""
        if self.log_weights is None:
            return self.x.new_full((len(self),), 1 / (len(self) * processes.count()))
        return processes.share(torch.softmax(self.log_weights, 0))

    @property
    def ess(self) -> Float[Tensor, ""]:
        """Effective sample size of the weights, 1/Σ w_i²: n for equal weights, 1 if one particle has all of it."""
        if self.log_weights is None:
            return 1 / processes.total(self.weights.square().sum())
        return 1 / torch.softmax(self.log_weights, 0).square().sum()

    def _words(self) -> Iterable[str]:
        yield f"{len(self)} of {tuple(self.x.shape[1:])} {of_kind(self.x.dtype, self.x.device)}"
        if self.x.is_floating_point() and 1 <= self.x[0].numel() <= FEW_COORDINATES:
            yield f"mean={self._mean()}"
        if self.log_weights is not None:
            yield f"ess={brief(self.ess)}"
        held = {"log_z": self.log_z, "log_z_growth": self.log_z_growth, "condition": self.condition}
        yield from (f"{name}={brief(value)}" for name, value in held.items() if value is not None)

    def _mean(self) -> str:
        """The mean of every coordinate, with its standard error for independent particles."""
        x, w = self.x.detach().double().flatten(1), self.weights.detach().double()
        mean = w @ x
        error = ((w @ (x - mean).square()) * w.square().sum()).sqrt()
        return f"({', '.join(map(with_error, mean.tolist(), error.tolist()))})"

    def mean(self, values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """E_p[values] = Σ_i w_i values_i."""
        if self.log_weights is None:
            return processes.mean(values.mean())
        return processes.total(self.weights @ values)

    def whole(self) -> Particles:
        """The particles of all processes, these among them; differentiable in these alone."""
        if processes.count() == 1:
            return self
        x, condition = processes.gathered(self.x), self.condition
        if condition is not None:
            condition = {name: processes.gathered(part) for name, part in condition.items()}
        with processes.alone():
            return replace(self, x=x, condition=condition)


def checked_particles(x: Any, least: int = 2) -> Float[Tensor, "n *event"]:
    """Positions x, checked, as samplers keep them: detached, in single precision at least, which holds half precision.

    Raises:
        InvalidInputError: not a tensor; fewer than `least` particles, or events without a dimension; not floating-point
            numbers; NaN or infinity.
    """
    check_type("particles", x, Tensor, "use torch.as_tensor(particles), or their number")
    if x.ndim < 2 or len(x) < least or not x.numel():
        raise InvalidInputError(
            f"particles must have shape (n, *event) with n ≥ {least} and an event of at least one dimension, got "
            f"{tuple(x.shape)}"
        )
    if not x.is_floating_point() or x.layout is not torch.strided or x.is_meta:
        given = f"{x.dtype} in the layout {x.layout} on {x.device}"
        raise InvalidInputError(f"particles must be finite floating-point numbers, dense, got {given}")
    if not x.isfinite().all():
        raise InvalidInputError("particles must be finite floating-point numbers, but hold NaN or infinity")
    return x.detach().to(at_least_single(x.dtype))
