"""The model, its chain and its conditions, as the options ask for them: known by hand, or read off its pipeline.

    family known by hand   load → scheduler of the sampler → table;  embeddings and guidance around the network, later
    any other family       load the whole pipeline → run it with stand-ins for its network, under all prompts

Both give the same parts, and nothing behind this file asks which it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from implicit_diffusion.commands.finetune.specs import SetupSpec
from implicit_diffusion.commands.shared.conditioning import Conditioning, conditioning
from implicit_diffusion.commands.shared.read_model import ReadModel, read_model
from implicit_diffusion.commands.shared.sizes import sized
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.checkpoints import Checkpoint, find_checkpoint
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.pipelines.denoiser import PipelineDenoiser
from implicit_diffusion.models.pipelines.loading import load_pipeline
from implicit_diffusion.models.pipelines.reading import read_pipeline
from implicit_diffusion.models.pretrained import Pretrained, as_pipeline, load_pretrained
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.flow import is_flow
from implicit_diffusion.tables.named import default_sampler, pipeline_for, scheduler_for, table_for
from implicit_diffusion.tables.table import ChainTable


class Exported(NamedTuple):
    """What a pipeline is exported with.

    Args:
        scheduler: that the pipeline is saved with.
        table: of the chain that the pipeline then runs.
    """

    scheduler: Any
    table: ChainTable


@dataclass(frozen=True, repr=False)
class Opened(Shown):
    """A model as a chain.

    Args:
        pretrained: the model.
        sampler: name of the chain's sampler.
        table: of the chain.
        exported: scheduler and table of the exported pipeline.
        conditions: makes what trajectories are sampled under; given the device that text encoders may compute on.
    """

    pretrained: Pretrained
    sampler: str
    table: ChainTable
    exported: Exported
    conditions: Callable[[torch.device], Conditioning]


def open_model(spec: SetupSpec) -> Opened:
    """Load the model that `spec` names, and find its chain.

    Raises:
        InvalidInputError: see `load_pretrained`, `read_pipeline`, `scheduler_for`, `table_for`; options that the model
            does not have.
    """
    checkpoint = find_checkpoint(spec.network.model)
    return (_read if checkpoint.family.probed else _known)(spec, checkpoint)


def _known(spec: SetupSpec, checkpoint: Checkpoint) -> Opened:
    """A model of a family that is known by hand."""
    frozen = spec.network.lora_rank is not None and not spec.network.shard
    pretrained = sized(load_pretrained(spec.network.model, frozen=frozen), spec.chain.size, spec.chain.frames)
    clip = False if spec.chain.no_clip or pretrained.family.latent else None
    sampler = spec.chain.sampler or default_sampler(pretrained.scheduler)
    scheduler = scheduler_for(pretrained.scheduler, sampler, clip=clip)
    table = table_for(scheduler, sampler, spec.chain.num_steps, eta=spec.chain.eta)
    saved, its_sampler = pipeline_for(scheduler, sampler)
    if pretrained.family is PIXELS:
        as_pipeline(pretrained.denoiser, saved)
    eta = spec.chain.eta if sampler == "ddim" and pretrained.family.passes_eta else 0.0
    exported = Exported(saved, table_for(saved, its_sampler, spec.chain.num_steps, eta=eta))
    return Opened(
        pretrained, sampler, table, exported, lambda device: conditioning(spec.conditions, pretrained, device)
    )


def _read(spec: SetupSpec, checkpoint: Checkpoint) -> Opened:
    """A model whose chain is read off its pipeline."""
    chain = spec.chain
    read = read_model(
        checkpoint,
        spec.conditions,
        chain.num_steps,
        sampler=chain.sampler,
        size=chain.size,
        frames=chain.frames,
        eta=chain.eta,
        frozen=spec.network.lora_rank is not None and not spec.network.shard,
    )
    exported = _exported(read, chain.num_steps)
    return Opened(read.pretrained, read.sampler, read.probed.table, exported, lambda device: read.conditioning)


def _exported(read: ReadModel, num_steps: int) -> Exported:
    """The scheduler that the exported pipeline is saved with, and the chain that it then runs, read off as well."""
    saved, _ = pipeline_for(read.probed.pipeline.scheduler, read.sampler)
    runs = copy.copy(read.probed.pipeline)
    runs.register_modules(scheduler=saved)
    call = read.call
    if "negative_prompt" in call:
        call = call | {"negative_prompt": call["negative_prompt"][:1]}
    table = read_pipeline(runs, num_steps, prompts=read.conditioning.prompts[:1] or None, **call).table
    return Exported(saved, table.unscaled())


def original_of(spec: SetupSpec, pretrained: Pretrained) -> Pretrained:
    """The model of --reference, which must be one that `pretrained` can have been trained from."""
    network = spec.network
    assert network.reference is not None
    if not pretrained.family.probed:
        original = sized(
            load_pretrained(network.reference, frozen=not network.shard), spec.chain.size, spec.chain.frames
        )
    else:
        pipeline = load_pipeline(network.reference, frozen=not network.shard)
        assert isinstance(pretrained.denoiser, PipelineDenoiser)
        checkpoint = find_checkpoint(network.reference)
        denoiser = PipelineDenoiser(getattr(pipeline, checkpoint.family.part), pretrained.denoiser.plan).eval()
        original = replace(pretrained, denoiser=denoiser, scheduler=pipeline.scheduler, checkpoint=checkpoint)
    for what, ours, theirs in (
        ("samples", pretrained.event_shape, original.event_shape),
        ("network", pretrained.family.network, original.family.network),
        ("weights", *map(_shapes, (pretrained.denoiser, original.denoiser))),
        ("classes", pretrained.num_classes, original.num_classes),
        ("prediction_type", *(_prediction(each.scheduler) for each in (pretrained, original))),
        ("num_train_timesteps", *(each.scheduler.config.num_train_timesteps for each in (pretrained, original))),
    ):
        if ours != theirs:
            raise InvalidInputError(
                f"--reference {network.reference} is not the original of --model {network.model}: its {what} are "
                f"{theirs}, not {ours}"
            )
    return original


def _shapes(denoiser: DiffusersDenoiser) -> str:
    """How many weights a network has, in how many tensors."""
    shapes = [tuple(weight.shape) for weight in denoiser.model.state_dict().values()]
    return f"{sum(torch.Size(shape).numel() for shape in shapes)} in {len(shapes)} tensors"


def _prediction(scheduler: Any) -> str | None:
    """What the network of a scheduler's model predicts. Not every flow scheduler names it."""
    return "flow_prediction" if is_flow(scheduler) else scheduler.config.get("prediction_type")
