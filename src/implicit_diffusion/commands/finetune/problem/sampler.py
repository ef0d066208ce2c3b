"""The sampler of a model: the chain that is trained, and the one that the exported model runs.

a checkpoint's scheduler   →  a named sampler on its noise schedule; exported as a pipeline of diffusers
a scheduler of one's own   →  the same; exported is the chain itself, in chain.json
a table of one's own       →  that table, with all of its rows
"""

from __future__ import annotations

from typing import Any, NamedTuple

from implicit_diffusion.commands.finetune.config import STEPS
from implicit_diffusion.commands.finetune.specs import ChainSpec
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.families import PIXELS
from implicit_diffusion.models.own_models.opened import OwnModel
from implicit_diffusion.models.pretrained import Pretrained, as_pipeline
from implicit_diffusion.tables.named import default_sampler, pipeline_for, scheduler_for, table_for
from implicit_diffusion.tables.table import ChainTable


class Exported(NamedTuple):
    """What a model is exported with.

    Args:
        scheduler: that its pipeline is saved with; None for a model without one.
        table: of the chain that it then runs.
    """

    scheduler: Any
    table: ChainTable


class Sampler(NamedTuple):
    """The sampler of a run.

    Args:
        name: one of `NAMED_SAMPLERS`; None for a table that the model comes with.
        table: of the chain that is trained.
        exported: see there.
    """

    name: str | None
    table: ChainTable
    exported: Exported


def sampler_of(pretrained: Pretrained, asked: ChainSpec) -> Sampler:
    """The sampler that is asked for, or the default of the model.

    Raises:
        InvalidInputError: from `scheduler_for` and `table_for`; no pipeline of diffusers runs it; a sampler or a number
            of steps for a model that comes with the table of its own.
    """
    own = isinstance(pretrained, OwnModel)
    if isinstance(pretrained, OwnModel) and pretrained.table is not None:
        table = _check_own(pretrained.table, pretrained.source, asked)
        return Sampler(None, table, Exported(None, table))
    num_steps = asked.num_steps or STEPS
    clip = False if asked.no_clip or pretrained.family.latent else None
    name = asked.sampler or default_sampler(pretrained.scheduler)
    scheduler = scheduler_for(pretrained.scheduler, name, clip=clip)
    table = table_for(scheduler, name, num_steps, eta=asked.eta)
    if own:
        return Sampler(name, table, Exported(None, table))
    saved, its_name = pipeline_for(scheduler, name)
    if pretrained.family is PIXELS:
        as_pipeline(pretrained.denoiser, saved)
    eta = asked.eta if name == "ddim" and pretrained.family.passes_eta else 0.0
    return Sampler(name, table, Exported(saved, table_for(saved, its_name, num_steps, eta=eta)))


def _check_own(table: ChainTable, source: str, asked: ChainSpec) -> ChainTable:
    if asked.sampler is not None:
        raise InvalidInputError(
            f"--scheduler {asked.sampler}: {source} returns the table of its own sampler, {table.name}; leave "
            "--scheduler out, or let it return a scheduler of diffusers as its schedule"
        )
    if asked.num_steps not in (None, len(table)):
        raise InvalidInputError(
            f"--num-steps {asked.num_steps}: {source} returns a table of {len(table)} rows, {table.name}, and each is "
            "a step; leave --num-steps out, or let it return another table, or a scheduler of diffusers"
        )
    return table
