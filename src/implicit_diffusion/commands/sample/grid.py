"""Images as a grid, and what they are drawn under, in turn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.shared.conditioning import Conditioning
from implicit_diffusion.commands.shared.pictures import filmstrips
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.models.decoders import Decoder
from implicit_diffusion.models.pretrained import Pretrained

TILE = 64  # least length of the longer side of an image, in pixels


def check_pictures(pretrained: Pretrained, model: str) -> None:
    """Refuse a model whose samples are not pictures; `model` is its name."""
    decoder, channels = pretrained.decoder, None  # the end of a pipeline that is read off makes pictures
    if decoder is None:
        channels = pretrained.event_shape[0]
    elif isinstance(decoder, Decoder):
        channels = decoder.vae.config.out_channels
    if channels not in (None, 1, 3, 4):
        raise InvalidInputError(f"--model {model} has samples of {channels} channels, which no picture shows")


@torch.no_grad()
def pictures_of(pretrained: Pretrained, x: Tensor) -> list[Any]:
    """The pictures of samples, which are decoded where they are latents; frames of a video stand side by side."""
    require("diffusers")
    from diffusers.utils import pt_to_pil

    return list(pt_to_pil(x if pretrained.decoder is None else filmstrips(pretrained.decoder(x))))


def shown_as_pictures(images: Tensor) -> list[Any]:
    """The pictures of what a pipeline of diffusers returns as tensors in [0, 1]: images, or videos frames first."""
    require("diffusers")
    from diffusers.utils import pt_to_pil

    return list(pt_to_pil(2 * filmstrips(images if images.ndim == 4 else images.transpose(1, 2)) - 1))


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
