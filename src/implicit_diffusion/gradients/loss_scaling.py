r"""Γ through a network that computes in float16: a surrogate scaled to what float16 can hold.

float16 ends at 65504 and is zero below 6·10⁻⁸, while the cotangents of the network's output,

    v = ∂ surrogate_k / ∂u = b_k λ_{k+1} + ∂c_k/∂u,

are rewards per number of a batch of images, at rows whose b_k may be small: unscaled, many of them vanish on their
way into the network. The pull-back is linear in v. So for a power of two S

    ∇(S · surrogate_k) / S = ∇ surrogate_k,

except for what leaves float16's range, which S decides. It is chosen per call, so that ½T ≤ S ‖v‖₁ < T: no sum over
v, such as the gradient of the last layer's bias, can then exceed T, and the mean |S v| is T over the numbers of a
batch, far above the smallest one in either direction. What overflows nevertheless comes out infinite, and the loop
stops.

S stays on the device, and is divided out of the call's own gradients before they are added to `.grad`, which may
already hold those of other calls with another S; and before distributed wrappers see them.
(Micikevicius et al., *Mixed Precision Training*, arXiv 1710.03740, with a scale that needs no search.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.denoisers.adapter import unwrapped
from implicit_diffusion.tables.transition import Transition

TOTAL = 2.0**11  # T
SMALLEST = 2.0**-100  # ‖v‖₁ below this is not scaled up to T: S stays a float32


def computes_in_float16(denoiser: object) -> TypeGuard[nn.Module]:
    """Whether the network inside says so, by an attribute `precision` as that of `DiffusersDenoiser`."""
    return isinstance(denoiser, nn.Module) and getattr(unwrapped(denoiser), "precision", None) is torch.float16


def scale(cotangents: Iterable[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """S, a power of two with T/2 ≤ S ‖v‖₁ < T; one if v vanishes or is not finite."""
    norm = torch.stack([v.abs().sum() for v in cotangents]).sum()
    sound = (norm > 0) & norm.isfinite()
    norm = torch.where(sound, norm, 1.0).clamp(min=SMALLEST)
    mantissa, _ = torch.frexp(norm)
    return torch.where(sound, TOTAL * (mantissa / norm), 1.0)  # norm = mantissa · 2ᵉ, so that the quotient is exact


def backward_through(denoiser: object, surrogate: Float[Tensor, ""], transition: Transition, *others: Tensor) -> None:
    """`surrogate.backward()`, scaled where the network computes in float16.

    Args:
        denoiser: u_θ.
        surrogate: a scalar.
        transition: the call of the network that it follows.
        others: what needs a gradient besides the parameters, such as the states.
    """
    if computes_in_float16(denoiser):
        backward(surrogate, (transition.u, transition.u0), (*others, *denoiser.parameters()))
    else:
        surrogate.backward()


def backward(surrogate: Float[Tensor, ""], predictions: Iterable[Tensor | None], leaves: Iterable[Tensor]) -> None:
    """`surrogate.backward()` with float16 in between: adds ∇ surrogate to the leaves' `.grad`.

    Args:
        surrogate: a scalar.
        predictions: the network's outputs, u_θ and, where it was evaluated, u_0.
        leaves: all tensors that need a gradient.
    """
    factor = _factor(surrogate, predictions)
    hooks = [leaf.register_hook(lambda g: g / factor) for leaf in leaves if leaf.requires_grad]
    try:
        surrogate.backward(factor)
    finally:
        for hook in hooks:
            hook.remove()


def slope_through(denoiser: object, surrogate: Float[Tensor, ""], transition: Transition, x: Tensor) -> Tensor:
    """∇_x surrogate alone, scaled where the network computes in float16; the graph is kept. Arguments as above."""
    factor = torch.ones_like(surrogate)
    if computes_in_float16(denoiser):
        factor = _factor(surrogate, (transition.u, transition.u0))
    return torch.autograd.grad(surrogate, x, factor, retain_graph=True)[0] / factor


def _factor(surrogate: Float[Tensor, ""], predictions: Iterable[Tensor | None]) -> Float[Tensor, ""]:
    """S."""
    outputs = [u for u in predictions if u is not None and u.requires_grad]
    cotangents = torch.autograd.grad(surrogate, outputs, retain_graph=True, allow_unused=True)
    return scale(v for v in cotangents if v is not None)
