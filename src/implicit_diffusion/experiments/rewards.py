"""Rewards that need nothing but torch: how bright, or how dark, an image is.

Images have pixels in [-1, 1]; -1 is black, +1 is full white. A reward is any callable (batch, *event) -> (batch,).
"""

from jaxtyping import Float
from torch import Tensor


def brightness(x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Mean pixel of each image in per cent of full white: 0 for all -1, 100 for all +1. Linear, not clipped.

    Args:
        x: images with shape (batch, *event), nominally in [-1, 1].

    Returns:
        Rewards with shape (batch,).
    """
    return 50.0 * (x.flatten(1).mean(dim=1) + 1.0)


def darkness(x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Minus the brightness, in per cent of full white: the reward of dark images.

    Args:
        x: images with shape (batch, *event), nominally in [-1, 1].

    Returns:
        Rewards with shape (batch,).
    """
    return -brightness(x)
