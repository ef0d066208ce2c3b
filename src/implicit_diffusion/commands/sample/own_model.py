"""Draw from a network of the user's own: by the chain that it was fine-tuned for, else by its table or scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from implicit_diffusion.commands.finetune.problem.sampler import sampler_of
from implicit_diffusion.commands.finetune.specs import ETA, ChainSpec
from implicit_diffusion.commands.sample.config import Config
from implicit_diffusion.commands.sample.grid import check_pictures, in_turn, parts_of, write_samples
from implicit_diffusion.commands.shared.conditioning import ConditioningSpec, conditioning
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import at_once
from implicit_diffusion.models.chain_file import TrainedChain, read_chain
from implicit_diffusion.models.own_models.opened import OwnModel
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import progress
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.samplers.chain import Chain

STEPS = 50  # of a scheduler, by default


def sample_own_model(model: OwnModel, config: Config) -> Path:
    """Write the samples and return the path of the file.

    Raises:
        InvalidInputError: prompts; a number of steps that the model's table does not have; samples that the file
            cannot show.
    """
    check_pictures(model, config.model, config.out)
    trained = None if model.folder is None else read_chain(model.folder)
    table = _table(model, trained, config)
    guidance, null_class = (None, None) if trained is None else (trained.guidance, trained.null_class)
    device = find_device(config.device)
    given = conditioning(ConditioningSpec(config.model, config.prompts, guidance, null_class), model, device)
    for network in filter(None, (model.denoiser, model.decoder)):
        network.to(device)
    denoiser, noise, size = given.around(model.denoiser, given.guidance), Noise(config.seed), at_once(model.event_shape)
    parts: list[Any] = []
    with progress(config.num, "sampling") as bar, torch.no_grad():
        for first in range(0, config.num, size):
            numbers = range(first, min(first + size, config.num))
            condition = None if given.drawn is None else lambda *which, numbers=numbers: in_turn(given, numbers)
            chain = Chain(denoiser, table, model.event_shape, condition=condition)
            parts += parts_of(model, chain.sample(noise, len(numbers), first), config.out)
            bar.update(advance=len(numbers))
    write_samples(parts, config.out)
    print(config.out)
    return config.out


def _table(model: OwnModel, trained: TrainedChain | None, config: Config) -> Any:
    """The rows that the model was trained on, or those that it comes with or is asked for."""
    steps = config.num_steps
    if trained is not None and steps in (None, len(trained.table)):
        return trained.table
    if model.table is not None and steps not in (None, len(model.table)):
        raise InvalidInputError(
            f"--num-steps {steps}: {config.model} has a table of {len(model.table)} rows, and each is a step; leave "
            "--num-steps out"
        )
    if model.table is None:
        steps = steps or STEPS
    return sampler_of(model, ChainSpec(None, steps, ETA, no_clip=True, noiseless_rows_pretrained=False)).table
