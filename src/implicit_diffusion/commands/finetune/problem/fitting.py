"""Whether a checkpoint can fit at all: asked of its configs and the headers of its weights, before any is read."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from implicit_diffusion.commands.finetune.problem.adapters import add_adapters
from implicit_diffusion.commands.finetune.problem.needs import Needs, activation_bytes, weight_bytes
from implicit_diffusion.commands.finetune.specs import Flight, NetworkSpec
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.lora import WithoutAdapter, checkpoint_activations
from implicit_diffusion.gradients.footprint import bytes_of
from implicit_diffusion.models.checkpoints import find_checkpoint
from implicit_diffusion.models.families import PIXELS, PipelineFamily
from implicit_diffusion.models.parts import saved_dtype, without_memory
from implicit_diffusion.models.pretrained import event_shape_of, meta_inputs
from implicit_diffusion.noise import Noise

MOMENTS = 2  # of Adam, per trained number


def needs_of(spec: NetworkSpec, flight: Flight, noise: Noise) -> Needs:
    """What a run needs at least.

    Args:
        spec: of the network.
        flight: how many samples there are at a time.
        noise: any, for adapters without numbers.

    Raises:
        InvalidInputError: a part whose config and headers do not fit together; see `load_model`.
    """
    checkpoint, source = find_checkpoint(spec.model), spec.model
    family = checkpoint.family
    with checkpoint.laid_out() as folder:
        network, headers = without_memory(checkpoint, folder, family.part, "network", source)
        others = {
            part: weight_bytes(without_memory(checkpoint, folder, part, part.replace("_", " "), source)[0])
            for part in checkpoint.parts
            if part == "vae" or part.startswith("text_encoder")
        }
    shape = event_shape_of(network, family, source)
    numbers = sum(p.numel() for p in network.parameters())
    kept = saved_dtype(headers) if spec.adapted and not spec.shard and family is not PIXELS else None
    weights = weight_bytes(network) if kept is None else weight_bytes(network, min(kept, torch.float32, key=_size))
    network.requires_grad_(True)
    if not spec.adapted:
        weights, trained = 2 * weights, (1 + MOMENTS) * 4 * numbers
    else:
        add_adapters(network, spec, noise, family)
        trained = (2 + MOMENTS) * 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    if spec.gradient_checkpointing:
        checkpoint_activations(network)
    per_sample = _activations(network, spec, shape, family)
    return Needs(
        network=weights // flight.parts if spec.shard else weights,
        trained=trained // flight.parts if spec.shard else trained,
        decoder=others.pop("vae", 0),
        encoder=max(others.values(), default=0),
        states=flight.events * bytes_of(shape, torch.float32),
        activations=flight.samples * per_sample // (1 if spec.precision == "float32" else 2),
    )


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _activations(network: Any, spec: NetworkSpec, shape: tuple[int, ...], family: PipelineFamily) -> int:
    """Bytes per sample of u_θ and of u_0 without guidance, under a condition of two tokens: fewer than there will be.

    Zero where the network cannot be evaluated without numbers.
    """
    u = DiffusersDenoiser(network)
    u_0 = WithoutAdapter(u) if spec.adapted else None

    def call(part: nn.Module, n: int) -> object:
        classes = network.config.get("num_class_embeds") or network.config.get("num_embeds_ada_norm")
        x, t, condition = meta_inputs(network, family, shape, n, num_classes=classes)
        return part(x.requires_grad_(), t, **condition)

    try:
        return activation_bytes([functools.partial(call, part) for part in (u, u_0) if part is not None])
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return 0
