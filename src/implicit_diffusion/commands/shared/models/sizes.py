"""The size of samples, as asked for: height and width in pixels, and frames of a video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.models.decoders import Decoder
from implicit_diffusion.models.families import PipelineFamily
from implicit_diffusion.models.own_models.opened import OwnModel
from implicit_diffusion.models.pretrained import Pretrained, meta_inputs

Size = tuple[int, int]  # height and width


def call_of(family: PipelineFamily, size: Size | None, frames: int | None, guidance: float | None) -> dict[str, Any]:
    """The arguments of a call of a pipeline that is read off, for `read_pipeline`.

    Raises:
        InvalidInputError: the pipeline does not have one of them.
    """
    name = family.pipelines[0]
    if frames is not None and not family.frames:
        raise InvalidInputError(f"--frames: a {name} makes images, not videos; leave it out")
    if guidance is not None and not family.guided:
        raise InvalidInputError(f"--guidance: a {name} has no guidance_scale; leave it out")
    call: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    call |= {} if frames is None else {"num_frames": frames}
    return call | ({} if size is None else dict(zip(("height", "width"), size)))


def sized(pretrained: Pretrained, size: Size | None, frames: int | None) -> Pretrained:
    """A model of a family that is known by hand, with samples of another size where one is asked for.

    Raises:
        InvalidInputError: its network or its autoencoder does not work on samples of that size.
    """
    if frames is not None:
        raise InvalidInputError(f"--frames: {pretrained.source} makes images, not videos; leave it out")
    if size is not None and isinstance(pretrained, OwnModel):
        raise InvalidInputError(f"--size: {pretrained.source} says the shape of its samples itself; leave it out")
    factor = pretrained.decoder.factor if isinstance(pretrained.decoder, Decoder) else 1
    if size is None:
        return pretrained
    height, width = size
    if height % factor or width % factor:
        raise InvalidInputError(
            f"--size {height} {width}: both must be multiples of {factor}, the pixels of the autoencoder's latents"
        )
    other = replace(pretrained, event_shape=(pretrained.event_shape[0], height // factor, width // factor))
    if other.event_shape == pretrained.event_shape:
        return pretrained
    arguments = (pretrained.denoiser.model, pretrained.family, other.event_shape)
    x, t, condition = meta_inputs(*arguments, num_classes=pretrained.num_classes)
    zeros = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in condition.items()}
    try:
        with torch.no_grad():
            u = pretrained.denoiser(torch.zeros(x.shape), torch.zeros(t.shape), **zeros)
    except Exception as error:  # networks raise many
        raise InvalidInputError(
            f"--size {height} {width}: the network of {pretrained.source} does not work on samples of this size "
            f"({one_line(error)})"
        ) from error
    if u.shape != x.shape:
        raise InvalidInputError(
            f"--size {height} {width}: the network of {pretrained.source} makes {tuple(u.shape[1:])} of samples "
            f"{tuple(x.shape[1:])}; try multiples of {8 * factor}"
        )
    return other
