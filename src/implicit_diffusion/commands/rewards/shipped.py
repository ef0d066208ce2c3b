"""Rewards that need no model: how bright, dark, red or sharp an image is, and the size of its JPEG file.

Images have pixels in [-1, 1]; -1 is black, +1 is full white. A reward is any callable (batch, *event) -> (batch,).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError

if TYPE_CHECKING:
    import PIL.Image

QUALITY = 95  # of a JPEG file
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as a grey picture of PIL or OpenCV
LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


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


def sharpness(x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Variance of the Laplacian of each grey image, whose pixels go from 0 to 255; the larger the sharper.

    The measure of focus of Pech-Pacheco et al. (ICPR 2000), as `cv2.Laplacian(grey, cv2.CV_64F).var()` computes it, but
    without rounding pixels, so that it is differentiable. Pixels outside [-1, 1] count as black or white.

    Args:
        x: grey or colour images with shape (batch, 1 or 3, height, width), nominally in [-1, 1].

    Returns:
        Rewards with shape (batch,).

    Raises:
        InvalidInputError: samples that are no such images, or that are a single pixel high or wide.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 2:
        raise InvalidInputError(
            "reward sharpness needs images (n, 1, height, width) or (n, 3, height, width) of two pixels or more each "
            f"way, got {tuple(x.shape)}"
        )
    pixels = 127.5 * (x.clamp(-1, 1) + 1)
    grey = pixels if x.shape[1] == 1 else torch.einsum("c,bchw->bhw", x.new_tensor(LUMA), pixels)[:, None]
    padded = torch.nn.functional.pad(grey, (1, 1, 1, 1), mode="reflect")
    edges = torch.nn.functional.conv2d(padded, x.new_tensor(LAPLACE)[None, None])
    return edges.flatten(1).var(1, correction=0)


def jpeg_size(images: list[PIL.Image.Image]) -> list[float]:
    """Size of each image as a JPEG file of quality 95, in kB (1000 bytes); it has no gradient.

    The reward "incompressibility" of Black et al., *Training Diffusion Models with Reinforcement Learning*, arXiv
    2305.13301.
    """
    return [_jpeg_bytes(image) / 1000 for image in images]


def compressibility(images: list[PIL.Image.Image]) -> list[float]:
    """Minus `jpeg_size`, in kB: the reward of images that compress well; it has no gradient."""
    return [-size for size in jpeg_size(images)]


def _jpeg_bytes(image: Any) -> int:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=QUALITY)
    return file.tell()


SHIPPED: dict[str, Callable[..., Any]] = {
    "brightness": brightness,
    "darkness": darkness,
    "redness": redness,
    "sharpness": sharpness,
    "jpeg-size": jpeg_size,
    "compressibility": compressibility,
}
