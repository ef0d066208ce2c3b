"""V and ∇V at the particles, and what a module must satisfy to be a potential.

Particles are kept in single precision at least, as the states of chains are: steps of a sampler are far below the
spacing of float16 and bfloat16. A potential in half precision is called in that, on particles rounded to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_call, trying
from implicit_diffusion.frozen import refuse_inference_mode
from implicit_diffusion.function_checks import BY_TORCH, TRIED, check_own_gradient, check_separate
from implicit_diffusion.particles import checked_particles
from implicit_diffusion.rounding import at_least_single
from implicit_diffusion.showing import of_tuple

COARSE = 0.02  # nats that V must resolve where its values matter


class Energy(NamedTuple):
    """V and ∇V at n points, detached.

    Args:
        value: V(x_i; θ), with shape (n,).
        grad: ∇V(x_i; θ), with shape (n, *event).
    """

    value: Tensor
    grad: Tensor

    def __repr__(self) -> str:
        return of_tuple(self)


def precision(potential: object, x: Float[Tensor, "*n_event"]) -> torch.dtype:
    """The dtype that V is called in at particles x: half where its parameters are in half, that of x elsewhere."""
    first = next(potential.parameters(), x) if isinstance(potential, nn.Module) else x
    fits = first.dtype.is_floating_point and at_least_single(first.dtype) == x.dtype
    return first.dtype if fits else x.dtype


def value_of(potential: Callable[[Tensor], Tensor], x: Float[Tensor, "*n_event"]) -> Float[Tensor, "*n"]:
    """V at x, called in its own `precision` and returned in that of x."""
    return potential(x.to(precision(potential, x))).to(x.dtype)


def energy_of(potential: Callable[[Tensor], Tensor], x: Float[Tensor, "*n_event"]) -> Energy:
    """V and ∇V at x: one forward and one pull. V(x)_i depends on x_i alone, so ∇ Σ_i V_i holds all the ∇V_i."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = value_of(potential, x)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return Energy(value.detach(), grad)


def known_log_z(potential: object) -> float | None:
    """Log ∫ e^{−V} of a potential that has it as a number, `potential.log_z`; None where it has none.

    Raises:
        InvalidInputError: an attribute of that name that is not a number.
    """
    log_z = getattr(potential, "log_z", None)
    number = isinstance(log_z, (int, float)) or (isinstance(log_z, Tensor) and log_z.ndim == 0)
    if log_z is not None and (not number or isinstance(log_z, nn.Parameter)):
        raise InvalidInputError(
            f"potential.log_z must be log ∫ e^(−V) as a number, got {type(log_z).__name__}; give anything else "
            "another name"
        )
    return None if log_z is None else float(log_z)


def check_potential(potential: Callable[[Tensor], Tensor], x: Float[Tensor, "n *event"]) -> None:
    """Try a potential: its form and its gradient on two points, and whether it is finite on all of them.

    Raises:
        InvalidInputError: another shape than (n,), another dtype or device, NaN or infinity, no gradient in x, points
            that influence each other (e.g. by BatchNorm in training mode), or an error of the potential's own.
    """
    check_call("potential", potential, "x")
    x = checked_particles(x, 1)
    refuse_inference_mode()
    own = precision(potential, x)
    with torch.enable_grad(), trying("potential", f"particles of shape {tuple(x[:2].shape)} in {own}"):
        probe = x[:2].detach().clone().requires_grad_()
        value = potential(probe.to(own))
    if not isinstance(value, Tensor) or value.shape != (len(probe),):
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInputError(
            f"potential must return one number per particle, shape ({len(probe)},) for input {tuple(probe.shape)}, got "
            f"{given}; sum over all dimensions but the first"
        )
    if (value.dtype, value.device) != (own, x.device):
        raise InvalidInputError(
            f"potential must return the particles' dtype and device, {own} on {x.device}, got {value.dtype} on "
            f"{value.device}; move one of them, e.g. potential.to(x.device, x.dtype)"
        )
    with torch.enable_grad():  # value[0] would have no history inside torch.no_grad
        grad = torch.autograd.grad(value[0], probe, allow_unused=True)[0] if value.requires_grad else None
    if grad is None:
        raise InvalidInputError(
            "potential is not differentiable in x: its result does not depend on the particles through torch "
            f"operations; {BY_TORCH}"
        )
    with torch.no_grad():
        everywhere = value_of(potential, x)
    for what, tensor in (("values", everywhere), ("gradients", grad)):
        if not tensor.isfinite().all():
            raise InvalidInputError(
                f"potential gives {what} that are NaN or infinite on the initial particles; they must be finite there"
            )
    check_own_gradient("potential", grad, of="particles")
    with torch.no_grad():
        few = x[:TRIED].detach()
        values = value_of(potential, few.clone())
        check_separate("potential", lambda index: value_of(potential, few[index]), values, of="particles")


def coarse(values: Float[Tensor, " n"], dtype: torch.dtype) -> str | None:
    """A warning where V is so large that its dtype resolves differences of V too coarsely; None elsewhere.

    Args:
        values: V at the particles.
        dtype: that V is computed in.
    """
    largest = float(values.abs().amax())
    step = torch.finfo(dtype).eps * largest
    if not step > COARSE:
        return None
    return (
        f"V is about {largest:.2g} at the particles, where {dtype} resolves {step:.1g} nats, and acceptance, weights "
        "and log Z depend on differences of V: subtract a constant from the potential, or compute it in a wider dtype"
    )
