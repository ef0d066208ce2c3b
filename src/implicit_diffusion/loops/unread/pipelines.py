"""What training a pipeline of any family needs at least, from its configs and the headers of its weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from implicit_diffusion.errors import ImplicitDiffusionError
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.loops.unread.needs import Call, Needs, Training, needs_of_network, weight_bytes, with_decoder
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.pipelines.unread import unread_pipeline
from implicit_diffusion.models.prompts import UNUSED


def needs_of_pipeline(checkpoint: Checkpoint, training: Training, num_steps: int, **options: Any) -> Needs:
    """What a run needs at least, while no weight of the pipeline is read.

    Args:
        checkpoint: of the pipeline.
        training: see there; adapters are beside weights in the dtype that they were saved in, unless these are shared
            out.
        num_steps: N.
        **options: other arguments of `read_pipeline`: prompts, of which the longest counts, size, sampler, by default
            the memoryless one, and those of the pipeline's own call.

    Raises:
        InvalidInputError: a part whose config is damaged or does not belong to its weights; see `unread_pipeline`.
            What `read_pipeline` would refuse is not refused here; states and activations are then not known.
    """
    unread = unread_pipeline(checkpoint)
    if training.shares == 1:
        training = replace(training, kept=unread.saved[unread.part])
    try:
        probed, unknown = unread.read(num_steps, **options), None
    except ImplicitDiffusionError as error:
        probed, unknown = None, f"the pipeline cannot be read without numbers ({one_line(error)})"
    call = (
        None
        if probed is None
        else Call(probed.denoiser, functools.partial(_called, probed.event_shape), probed.event_shape)
    )
    needs = needs_of_network(unread.network, call, training)
    beside = {part: model for part, model in unread.others.items() if part not in UNUSED}
    texts = {part: model for part, model in beside.items() if _is_encoder(model)}
    if probed is not None and probed.decoder is not None:
        needs = with_decoder(needs, probed.decoder, probed.event_shape, training.ending)
    return replace(
        needs,
        decoder=sum(weight_bytes(model) for part, model in beside.items() if part not in texts),
        encoders={part: weight_bytes(model) for part, model in texts.items()},
        on_host=True,
        unknown="; ".join(filter(None, (unknown, needs.unknown))) or None,
    )


def _called(event_shape: Sequence[int], u: nn.Module, n: int) -> object:
    """The call of u for n samples of the first prompt, on the meta device."""
    x = torch.zeros(n, *event_shape, device="meta", requires_grad=True)
    return u(x, torch.zeros(n, device="meta"), prompt=torch.zeros(n, dtype=torch.long))


def _is_encoder(model: nn.Module) -> bool:
    """Models of transformers encode; those of diffusers, such as autoencoders, stay beside the network."""
    return type(model).__module__.partition(".")[0] == "transformers"
