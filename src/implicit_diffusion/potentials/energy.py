"""V and ∇V at the particles, and what a module must satisfy to be a potential."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_call, check_tensor, trying
from implicit_diffusion.frozen import refuse_inference_mode
from implicit_diffusion.probing import check_own_gradient, check_separate

TRIED = 8  # particles, to see whether they influence each other


class Energy(NamedTuple):
    """V and ∇V at n points, detached.

    Args:
        value: V(x_i; θ), with shape (n,).
        grad: ∇V(x_i; θ), with shape (n, *event).
    """

    value: Float[Tensor, " n"]
    grad: Float[Tensor, "n *event"]


def energy_of(potential: Callable[[Tensor], Tensor], x: Float[Tensor, "n *event"]) -> Energy:
    """V and ∇V at x: one forward and one pull. V(x)_i depends on x_i alone, so ∇ Σ_i V_i holds all the ∇V_i."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = potential(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return Energy(value.detach(), grad)


def known_log_z(potential: object) -> float | None:
    """Log ∫ e^{−V} of a potential that has it as a number, `potential.log_z`; None where it has none.

    Raises:
        InvalidInputError: an attribute of that name that is something else.
    """
    found = getattr(potential, "log_z", None)
    number = isinstance(found, (int, float)) or (isinstance(found, Tensor) and found.ndim == 0)
    if found is not None and (not number or isinstance(found, nn.Parameter)):
        raise InvalidInputError(
            f"potential.log_z must be log ∫ e^(−V) as a number, got {type(found).__name__}; call anything else "
            "by another name"
        )
    return None if found is None else float(found)


def check_potential(potential: Callable[[Tensor], Tensor], x: Float[Tensor, "n *event"]) -> None:
    """Try a potential: its form and its gradient on two points, whether it is finite on all.

    Raises:
        InvalidInputError: another shape than (n,), another dtype or device, NaN or infinity, no gradient in x, or
            points that influence each other (BatchNorm in training mode, say).
    """
    check_call("potential", potential, "x")
    check_tensor("particles", x, "n *event", finite=True)
    refuse_inference_mode()
    with torch.enable_grad(), trying("potential", f"particles of shape {tuple(x[:2].shape)}"):
        probe = x[:2].detach().clone().requires_grad_()
        value = potential(probe)
    if not isinstance(value, Tensor) or value.shape != (len(probe),):
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInputError(
            f"potential must return one number per particle, shape ({len(probe)},) for input {tuple(probe.shape)}, got "
            f"{given}; sum over all dimensions but the first"
        )
    if (value.dtype, value.device) != (x.dtype, x.device):
        raise InvalidInputError(
            f"potential must return the particles' dtype and device, {x.dtype} on {x.device}, got {value.dtype} on "
            f"{value.device}; move one of them, e.g. potential.to(x.device, x.dtype)"
        )
    with torch.enable_grad():  # value[0] would have no history inside torch.no_grad
        grad = torch.autograd.grad(value[0], probe, allow_unused=True)[0] if value.requires_grad else None
    if grad is None:
        raise InvalidInputError(
            "potential is not differentiable in x: its result does not depend on the particles through torch "
            "operations; remove .detach(), .numpy() and torch.no_grad() from it"
        )
    with torch.no_grad():
        everywhere = potential(x)
    for what, tensor in (("values", everywhere), ("gradients", grad)):
        if not tensor.isfinite().all():
            raise InvalidInputError(f"potential gives {what} that are NaN or infinite on the initial particles")
    check_own_gradient("potential", grad, of="particles")
    with torch.no_grad():
        few = x[:TRIED].detach()
        check_separate("potential", lambda index: potential(few[index]), potential(few.clone()), of="particles")
