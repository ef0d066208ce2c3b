"""The model, its chain and its conditions, as the options ask for them: known by hand, or read off its pipeline.

    known by hand, or the user's own   load → sampler → table;  embeddings and guidance around the network, later
    any other pipeline                 load it whole → run it with stand-ins for its network, under all prompts

Both give the same parts, and nothing behind this file asks which it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicit_diffusion.commands.finetune.config import STEPS
from implicit_diffusion.commands.finetune.problem.sampler import Exported, sampler_of
from implicit_diffusion.commands.finetune.specs import SetupSpec
from implicit_diffusion.commands.shared.conditioning import Conditioning, conditioning
from implicit_diffusion.commands.shared.models.by_name import open_model
from implicit_diffusion.commands.shared.models.factories import factory_of
from implicit_diffusion.commands.shared.models.read_model import ReadModel, read_model
from implicit_diffusion.commands.shared.models.sizes import sized
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.checkpoints import Checkpoint, find_checkpoint
from implicit_diffusion.models.parts import load_network, load_scheduler
from implicit_diffusion.models.pipelines.denoiser import PipelineDenoiser
from implicit_diffusion.models.pipelines.reading import read_pipeline
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.flow import is_flow
from implicit_diffusion.tables.named import pipeline_for
from implicit_diffusion.tables.table import ChainTable


@dataclass(frozen=True, repr=False)
class Opened(Shown):
    """A model as a chain.

    Args:
        pretrained: the model.
        sampler: name of the chain's sampler; None for a table that the model comes with.
        table: of the chain.
        exported: scheduler and table of the exported pipeline.
        conditions: makes what trajectories are sampled under; given the device that text encoders may compute on.
    """

    pretrained: Pretrained
    sampler: str | None
    table: ChainTable
    exported: Exported
    conditions: Callable[[torch.device], Conditioning]


def open_chain(spec: SetupSpec) -> Opened:
    """Load the model that `spec` names, and find its chain.

    Raises:
        InvalidInputError: see `open_model`, `read_pipeline`, `sampler_of`; options that the model does not have.
    """
    name = spec.network.model
    checkpoint = None if factory_of(name) is not None else find_checkpoint(name)
    return _known(spec) if checkpoint is None or not checkpoint.family.probed else _read(spec, checkpoint)


def _known(spec: SetupSpec) -> Opened:
    """A model of the user's own, or of a family that is known by hand."""
    frozen = spec.network.adapted and not spec.network.shard
    pretrained = sized(open_model(spec.network.model, frozen=frozen), spec.chain.size, spec.chain.frames)
    sampler, table, exported = sampler_of(pretrained, spec.chain)
    return Opened(
        pretrained, sampler, table, exported, lambda device: conditioning(spec.conditions, pretrained, device)
    )


def _read(spec: SetupSpec, checkpoint: Checkpoint) -> Opened:
    """A model whose chain is read off its pipeline."""
    chain, num_steps = spec.chain, spec.chain.num_steps or STEPS
    read = read_model(
        checkpoint,
        spec.conditions,
        num_steps,
        sampler=chain.sampler,
        size=chain.size,
        frames=chain.frames,
        eta=chain.eta,
        frozen=spec.network.adapted and not spec.network.shard,
    )
    exported = _exported(read, num_steps)
    return Opened(read.pretrained, read.sampler, read.probed.table, exported, lambda device: read.conditioning)


def _exported(read: ReadModel, num_steps: int) -> Exported:
    """The scheduler that the exported pipeline is saved with, and the chain that it then runs, read off as well."""
    saved, its_sampler = pipeline_for(read.probed.pipeline.scheduler, read.sampler)
    if its_sampler == read.sampler:  # the chain that was read
        return Exported(saved, read.probed.table)
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
        original = sized(open_model(network.reference, frozen=not network.shard), spec.chain.size, spec.chain.frames)
    else:
        assert isinstance(pretrained.denoiser, PipelineDenoiser)
        checkpoint, name = find_checkpoint(network.reference), network.reference
        with checkpoint.laid_out() as folder:
            model = load_network(checkpoint, folder, name, own_dtype=not network.shard)
        denoiser, scheduler = PipelineDenoiser(model, pretrained.denoiser.plan).eval(), load_scheduler(checkpoint, name)
        original = replace(pretrained, denoiser=denoiser, scheduler=scheduler, checkpoint=checkpoint)
    for what, ours, theirs in (
        ("samples", pretrained.event_shape, original.event_shape),
        ("network", pretrained.family.network, original.family.network),
        ("classes", pretrained.num_classes, original.num_classes),
        ("prediction_type", *(_prediction(each.scheduler) for each in (pretrained, original))),
        ("num_train_timesteps", *(_timesteps(each.scheduler) for each in (pretrained, original))),
        ("weights", *map(_shapes, (pretrained.denoiser, original.denoiser))),
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
    """What the network of a scheduler's model predicts. Not every flow scheduler names it, and a table does not."""
    if scheduler is None:
        return None
    return "flow_prediction" if is_flow(scheduler) else scheduler.config.get("prediction_type")


def _timesteps(scheduler: Any) -> int | None:
    """Number of times that a scheduler's model was trained on; None for a table."""
    return None if scheduler is None else int(scheduler.config.num_train_timesteps)
