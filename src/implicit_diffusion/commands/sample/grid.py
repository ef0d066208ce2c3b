"""Samples as a grid of images, as points or as an array, and what they are drawn under, in turn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.commands.shared.pictures import PLANE, displayed, filmstrips
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.models.decoders import Decoder
from implicit_diffusion.models.own_models.opened import OwnModel
from implicit_diffusion.models.pretrained import Pretrained

COLOURS = (1, 3, 4)  # channels of a picture
TILE = 64  # least length of the longer side of an image, in pixels


def check_pictures(pretrained: Pretrained, model: str, out: Path) -> None:
    """Refuse a model whose samples the file cannot show; `model` is its name."""
    if out.suffix == ".npy":
        return
    if isinstance(pretrained, OwnModel):
        shape = pretrained.image_shape
        if shape != PLANE and (len(shape) != 3 or shape[0] not in COLOURS):
            raise InvalidInputError(
                f"--model {model} has samples of shape {shape}, which no picture shows; name a file FILE.npy as --out"
            )
        return
    decoder, channels = pretrained.decoder, None  # the end of a pipeline that is read off makes pictures
    if decoder is None:
        channels = pretrained.event_shape[0]
    elif isinstance(decoder, Decoder):
        channels = decoder.vae.config.out_channels
    if channels not in (None, *COLOURS):
        raise InvalidInputError(f"--model {model} has samples of {channels} channels, which no picture shows")


@torch.no_grad()
def parts_of(pretrained: Pretrained, x: Tensor, out: Path) -> list[Any]:
    """What `write_samples` writes of samples, decoded where they are latents: pictures, or tensors where the file
    is an array or samples are points.
    """
    images = displayed(x, pretrained.decoder)
    if out.suffix == ".npy" or images.shape[1:] == PLANE:
        return list(images.cpu())
    return pictures(images)


def pictures(images: Tensor) -> list[Any]:
    """The pictures of images in [−1, 1]."""
    require("diffusers")
    from diffusers.utils import pt_to_pil

    return list(pt_to_pil(images))


def shown_as_pictures(images: Tensor) -> list[Any]:
    """The pictures of what a pipeline of diffusers returns as tensors in [0, 1]: images, or videos frames first."""
    return pictures(2 * filmstrips(images if images.ndim == 4 else images.transpose(1, 2)) - 1)


def write_samples(parts: list[Any], out: Path) -> None:
    """Write what `parts_of` has returned, of all samples."""
    if not isinstance(parts[0], Tensor):
        write_grid(parts, out)
    elif out.suffix == ".npy":
        write_array(torch.stack(parts), out)
    else:
        write_plane(torch.stack(parts), out)


def write_array(x: Tensor, out: Path) -> None:
    """Write samples as an array of NumPy."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file, file.open("wb") as stream:
        np.save(stream, x.numpy(), allow_pickle=False)


def write_plane(x: Float[Tensor, "n 2"], out: Path) -> None:
    """Draw points of the plane."""
    from implicit_diffusion.commands.shared.drawing import finish_figure, sheet

    out.parent.mkdir(parents=True, exist_ok=True)
    figure = sheet(4.2, 4.2)
    axis = figure.subplots()
    axis.scatter(x[:, 0], x[:, 1], s=3, lw=0, color="#2a9d5c")
    axis.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    finish_figure(figure, out)


def write_grid(images: list[Any], out: Path) -> None:
    """Write images, of one size, as a nearly square grid; small ones are enlarged so that every pixel shows."""
    require("diffusers")
    from diffusers.utils import make_image_grid

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = images[0].copy()
    blank.paste(0, (0, 0, *blank.size))
    times = math.ceil(TILE / max(blank.size))  # the same for all pixels
    tile = (times * blank.width, times * blank.height)
    tiles = [image.resize(tile, resample=0) for image in [*images, *[blank] * (rows * columns - len(images))]]
    out.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(tiles, rows, columns).save(out)


def in_turn(given: Conditioning, numbers: range) -> dict[str, Tensor]:
    """The values of the condition, one after the other."""
    assert given.drawn is not None
    return {given.drawn.name: given.drawn.values[torch.tensor(list(numbers)) % len(given.drawn.values)]}
