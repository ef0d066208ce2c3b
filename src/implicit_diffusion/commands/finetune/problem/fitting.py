"""Whether a checkpoint can fit at all: asked of its configs and the headers of its weights, before any is read."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from implicit_diffusion.commands.finetune.config import STEPS
from implicit_diffusion.commands.finetune.problem.adapters import add_adapters
from implicit_diffusion.commands.finetune.problem.estimators import BLACK_BOX
from implicit_diffusion.commands.finetune.specs import Flight, SetupSpec
from implicit_diffusion.commands.shared.models.read_model import asked_of
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.loops.unread.needs import (
    Call,
    Needs,
    Training,
    check_needs,
    needs_of_network,
    weight_bytes,
    with_decoder,
)
from implicit_diffusion.loops.unread.pipelines import needs_of_pipeline
from implicit_diffusion.models.checkpoints import Checkpoint, find_checkpoint
from implicit_diffusion.models.decoders import Decoder
from implicit_diffusion.models.families import PIXELS, PipelineFamily
from implicit_diffusion.models.parts import saved_dtype, without_memory
from implicit_diffusion.models.pretrained import event_shape_of, meta_inputs
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import everywhere, is_main


def check_fit(spec: SetupSpec, flight: Flight, device: torch.device) -> None:
    """Refuse what cannot fit, and print what could not be counted.

    Raises:
        MemoryLimitError: see `check_needs`.
        InvalidInputError: see `needs_of`.
    """
    needs = needs_of(spec, flight)
    everywhere(lambda: check_needs(needs, device))
    if needs.note is not None and is_main():
        print(f"memory before loading: {needs}")


def needs_of(spec: SetupSpec, flight: Flight) -> Needs:
    """What a run needs at least.

    Args:
        spec: of the run.
        flight: how many samples there are at a time.

    Raises:
        InvalidInputError: a part whose config and headers do not fit together; see `load_model`.
    """
    checkpoint = find_checkpoint(spec.network.model)
    if not checkpoint.family.probed:
        return _of_known(checkpoint, spec, flight)
    chain, training = spec.chain, _training(spec, flight, checkpoint.family)
    trained, held_out, _, call = asked_of(checkpoint, spec.conditions, chain.size, chain.frames)
    if spec.conditions.student_guidance is not None:
        call["guidance_scale"] = spec.conditions.student_guidance  # of u_θ; u_0 needs as much or more
    options = call | {"prompts": [*trained, *held_out] or None, "sampler": chain.sampler}
    return needs_of_pipeline(checkpoint, training, chain.num_steps or STEPS, **options)


def _of_known(checkpoint: Checkpoint, spec: SetupSpec, flight: Flight) -> Needs:
    """The same for a family that is known by hand."""
    source, family, asked = spec.network.model, checkpoint.family, spec.network
    with checkpoint.laid_out() as folder:
        network, headers = without_memory(checkpoint, folder, family.part, "network", source)
        others = {
            part: without_memory(checkpoint, folder, part, part.replace("_", " "), source)[0]
            for part in checkpoint.parts
            if part == "vae" or part.startswith("text_encoder")
        }
    keeps = asked.adapted and not asked.shard and family is not PIXELS
    training = _training(spec, flight, family, saved_dtype(headers) if keeps else torch.float32)
    decoder = Decoder(others.pop("vae"), shifted=family.shifted) if "vae" in others else None
    shape = event_shape_of(network, family, source)
    if spec.chain.size is not None:
        factor = 1 if decoder is None else decoder.factor
        shape = (shape[0], *(side // factor for side in spec.chain.size))
    call = Call(DiffusersDenoiser(network), functools.partial(_called, network, shape, family), shape)
    needs = needs_of_network(network, call, training)
    if decoder is not None:
        needs = replace(with_decoder(needs, decoder, shape, training.ending), decoder=weight_bytes(decoder))
    return replace(needs, encoders={part: weight_bytes(model) for part, model in others.items()})


def _training(spec: SetupSpec, flight: Flight, family: PipelineFamily, kept: torch.dtype = torch.float32) -> Training:
    """What is trained, and how much there is at a time; frozen weights are kept in the dtype `kept`."""
    network = spec.network

    def adapt(module: nn.Module) -> None:
        add_adapters(module, network, Noise(0), family)  # without memory, there are no numbers to draw

    return Training(
        samples=flight.samples,
        events=flight.events,
        adapt=adapt if network.adapted else None,
        checkpointing=network.gradient_checkpointing,
        half=network.precision != "float32",
        kept=kept,
        shares=flight.parts if network.shard else 1,
        ending=0 if spec.estimator in BLACK_BOX else flight.ending,
    )


def _called(network: Any, shape: tuple[int, ...], family: PipelineFamily, u: nn.Module, n: int) -> object:
    """The call of u without guidance, under a condition of two tokens: fewer than there will be."""
    classes = network.config.get("num_class_embeds") or network.config.get("num_embeds_ada_norm")
    x, t, condition = meta_inputs(network, family, shape, n, num_classes=classes)
    return u(x.requires_grad_(), t, **condition)
