"""One step of a denoising chain: the quantities that a running cost may use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class Transition(Shown):
    """x⁺ = a x + b u_θ(m x, t) + s ξ on several slots at once, each slot on a row of its own.

    Args:
        x: states, with shape (slots, batch, *event).
        u: the network's prediction on the slots' rows (the pretrained one where the row is not trained), as `x`.
        u0: the pretrained network's prediction, as `x`; None where it was not asked for.
        a, b, s, h: the rows' coefficients, broadcastable to `x`, i.e. with shape (slots, 1, ...).
        trained: whether the network of the row is the one with parameters θ, shaped as `a`.
        evaluations: network calls × samples that it took in all processes, of both u_θ and u_0.
    """

    x: Float[Tensor, "slots batch *event"]
    u: Float[Tensor, "slots batch *event"]
    u0: Float[Tensor, "slots batch *event"] | None
    a: Float[Tensor, "slots ..."]
    b: Float[Tensor, "slots ..."]
    s: Float[Tensor, "slots ..."]
    h: Float[Tensor, "slots ..."]
    trained: Bool[Tensor, "slots ..."]
    evaluations: int = 0

    @property
    def mean(self) -> Float[Tensor, "slots batch *event"]:
        """E[x⁺ | x] = a x + b u."""
        return self.a * self.x + self.b * self.u

    @property
    def shift(self) -> Float[Tensor, "slots batch *event"]:
        """Δ/s = b (u_θ − u_0)/s: how far training has moved the mean, in units of the noise; 0 on untrained rows."""
        assert self.u0 is not None
        return torch.where(self.trained, self.b / self.s, 0) * (self.u - self.u0)

    def push(self, noise: Float[Tensor, "slots batch *event"] | None) -> Float[Tensor, "slots batch *event"]:
        """x⁺ = a x + b u + s ξ; without noise (None), the mean."""
        return self.mean if noise is None else self.mean + self.s * noise
