"""Precision of floating-point numbers: dtypes of states, and sums and distances without cancellation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states and data are kept in: float16 and bfloat16 become float32, which holds them exactly."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def widest(device: torch.device) -> torch.dtype:
    """The most precise dtype of a device: float64, except on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers in the widest dtype, for sums that cancel: V, rewards and α may share a large constant."""
    return values.to(widest(values.device))


def squared_distances(x: Float[Tensor, "n *event"], y: Float[Tensor, "m *event"]) -> Float[Tensor, "n m"]:
    """‖x_i − y_j‖² in the device's widest dtype, differentiable also where two points coincide.

    |x|² + |y|² − 2⟨x, y⟩ costs no tensor larger than n × m, but cancels as the points move away from the origin. So a
    common centre is subtracted from both first, and the rest is computed in double precision, which suffices for
    single-precision points even where they spread over 10⁶ times their distances.
    """
    x, y = exact(x.flatten(1)), exact(y.flatten(1))
    centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT).clamp(min=0)
