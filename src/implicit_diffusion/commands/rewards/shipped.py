"""Rewards that need nothing but torch: how bright, how dark or how red an image is.

Images have pixels in [-1, 1]; -1 is black, +1 is full white. A reward is any callable (batch, *event) -> (batch,).
"""

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError


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


def redness(x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Red minus the mean of green and blue, averaged over the image, in per cent of full scale.

    The paper's reward for CIFAR-10 (Marion et al., arXiv 2402.05468): 100 for pure red, 0 for any grey, -50 for pure
    green or blue. Linear, not clipped.

    Args:
        x: colour images with shape (batch, 3, height, width), nominally in [-1, 1].

    Returns:
        Rewards with shape (batch,).

    Raises:
        InvalidInputError: images without three channels.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise InvalidInputError(
            f"reward redness needs colour images (n, 3, height, width), got {tuple(x.shape)}; use brightness for grey "
            "images"
        )
    red, green, blue = x.flatten(2).mean(2).unbind(1)
    return 50.0 * (red - (green + blue) / 2)
