"""A diffusers pipeline from a folder, whole but for its text encoders, which are in memory only while they are called.

Network and autoencoder are loaded and checked as `parts` does, and text encoders are `deferred`: no two of them are
ever in memory together, and none beside the gradient of a network.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn

from implicit_diffusion.errors import check_type
from implicit_diffusion.models.checkpoints import Checkpoint, find_checkpoint
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.parts import load_model, load_network, without_memory
from implicit_diffusion.models.pipelines.deferred import deferred
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.models.prompts import assembled


def load_pipeline(model: str | PathLike[str], *, frozen: bool = False) -> Any:
    """Load a diffusers pipeline of any class for `read_pipeline`.

    Args:
        model: a local folder or a hub id, as for `load_pretrained`.
        frozen: whether the network's weights will not be trained, or its adapters alone; those that were saved in half
            precision then stay in it, and layers read them in single precision. A network that converts something to
            the dtype of its weights rounds it there.

    Returns:
        The pipeline, on the CPU, with text encoders that are loaded for the time of a call.

    Raises:
        InvalidInputError: as `load_pretrained` does.
        MissingExtraError: diffusers or transformers is not installed.
    """
    check_type("frozen", frozen, bool, "it says whether the weights stay as they are")
    checkpoint = find_checkpoint(model)
    if checkpoint.family is PIXELS:
        return load_pretrained(model, frozen=frozen).pipeline
    return pipeline_of(checkpoint, str(model), frozen=frozen)


def pipeline_of(checkpoint: Checkpoint, source: str, *, frozen: bool) -> Any:
    """The pipeline of a checkpoint; arguments and errors as in `load_pipeline`."""
    with checkpoint.laid_out() as folder:
        network = load_network(checkpoint, folder, source, own_dtype=frozen)
    encoders = {
        name: _deferred(checkpoint, name, source, network)
        for name, (library, _) in checkpoint.parts.items()
        if library == "transformers" and checkpoint.has_weights(name)
    }
    return assembled(checkpoint, {checkpoint.family.part: network} | encoders)


def _deferred(checkpoint: Checkpoint, part: str, source: str, network: nn.Module) -> nn.Module:
    """An encoder without memory whose calls load it to where the network is."""
    what = part.replace("_", " ")

    def place() -> torch.device:
        return next(network.parameters()).device

    def build() -> nn.Module:
        with checkpoint.laid_out() as folder:
            return without_memory(checkpoint, folder, part, what, source)[0]

    def load() -> nn.Module:
        with checkpoint.laid_out() as folder:
            return load_model(checkpoint, folder, part, what, source).to(place())

    return deferred(build, load, place)
