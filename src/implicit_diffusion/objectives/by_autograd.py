"""First variation and gradient of a functional of particles by autograd, from its value F(p) alone.

Write f(x, A) for F(Σ_i w_i δ_{x_i}) with w = softmax(A). Moving mass changes the weights alone, and
∂f/∂A_i = w_i (F′_i − E_p F′): so F′_i = (∂f/∂A_i)/w_i, up to a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import function_checks, processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.particles import Particles


def first_variation(
    name: str, value_of: Callable[[Particles], Float[Tensor, ""]], particles: Particles
) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
    """F′(p) at the particles, up to a constant, and F(p).

    Raises:
        InvalidInputError: something other than a 0-d tensor that depends on the weights through torch operations.
    """
    with torch.enable_grad():
        weights = particles.weights.detach()
        logs = processes.gathered(weights).log().requires_grad_()
        value = value_of(Particles(particles.x, logs, condition=particles.condition))
        gradient = None
        if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad:
            (gradient,) = torch.autograd.grad(value, logs, allow_unused=True)
        if gradient is None:
            raise InvalidInputError(
                f"{name} must be a 0-d tensor that depends on the particles' weights through torch operations, got "
                f"{_form(value)}"
            )
    gradient = processes.share(processes.total(gradient))
    return torch.where(weights > 0, gradient / weights, 0), value.detach()  # weights may underflow


def check_finite_scalar(name: str, value: object) -> None:
    """Raise `InvalidInputError` for a value of an objective that is not a finite number."""
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise InvalidInputError(f"{name} must be a 0-d tensor, got {_form(value)}")
    if not value.isfinite():
        raise InvalidInputError(f"{name} is {value.item()} on samples of the initial model; it must be finite")


def check_differentiable(name: str, value: object, x: Float[Tensor, "n *event"]) -> None:
    """Raise `InvalidInputError` for a value of an objective that has no gradient in the positions x."""
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise InvalidInputError(f"{name} must be a 0-d tensor, got {_form(value)}")
    gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise InvalidInputError(
            f"{name} is not differentiable in the samples: its value does not depend on them through torch operations; "
            f"{function_checks.BY_TORCH}, and without comparisons, or train a potential by Single, which needs no such "
            "derivative"
        )
    function_checks.check_slope(name, gradient, value.detach())


def _form(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
