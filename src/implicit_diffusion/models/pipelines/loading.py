"""A diffusers pipeline from a folder, whole but for its text encoders, which are in memory only while they are called.

Network and autoencoder are loaded and checked as `parts` does. A text encoder is built without memory, so that the
pipeline finds its config and dtype where it looks for them; a call loads the weights, answers, and releases them. No
two encoders are ever in memory together, and none beside the gradient of a network.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections import OrderedDict
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from implicit_diffusion.errors import check_type
from implicit_diffusion.files.fingerprints import fingerprint
from implicit_diffusion.models.checkpoints import Checkpoint, find_checkpoint
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.parts import load_model, load_network, without_memory
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.models.prompts import assembled

REMEMBERED = 8  # calls of an encoder: a pipeline that is read several times asks for the same embeddings


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
    with checkpoint.laid_out() as folder:
        encoder, _ = without_memory(checkpoint, folder, part, what, source)
    answers: OrderedDict[str, Any] = OrderedDict()

    def place(*_: Any) -> torch.device:
        return next(network.parameters()).device

    @functools.wraps(type(encoder).forward)
    @torch.no_grad()
    def forward(*args: Any, **kwargs: Any) -> Any:
        key = _key((args, kwargs))
        if key not in answers:
            with checkpoint.laid_out() as folder:
                loaded = load_model(checkpoint, folder, part, what, source).to(place())
            answers[key] = loaded(*args, **kwargs)
            del loaded
            gc.collect()  # modules refer to each other
        answers.move_to_end(key)
        while len(answers) > REMEMBERED:
            answers.popitem(last=False)
        return answers[key]

    bound = inspect.signature(type(encoder).forward)
    forward.__dict__["__signature__"] = bound.replace(parameters=list(bound.parameters.values())[1:])
    encoder.__dict__["forward"] = forward
    encoder.__class__ = type(type(encoder).__name__, (type(encoder),), {"device": property(place)})
    return encoder


def _key(arguments: Any) -> str:
    """A key of the arguments of a call, by their numbers."""
    leaves, tree = tree_flatten(arguments)
    return repr([tree, *((fingerprint(x), x.device) if isinstance(x, Tensor) else x for x in leaves)])
