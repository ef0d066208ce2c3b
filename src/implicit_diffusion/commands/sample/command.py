"""Draw a grid of images from a diffusers folder: by the chain that it was fine-tuned for, else with plain diffusers.

A fine-tuned model comes with `chain.json`, the table of its chain. The network then runs on all rows of that table,
whether or not diffusers has a pipeline for it, under the prompts or class labels in turn and with the guidance that it
was trained under. Another number of steps is another chain, and the folder's own pipeline draws.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from implicit_diffusion.commands.sample.config import Config as Config
from implicit_diffusion.commands.sample.energy import sample_energy_model
from implicit_diffusion.commands.sample.grid import (
    check_pictures,
    in_turn,
    pictures,
    shown_as_pictures,
    write_grid,
)
from implicit_diffusion.commands.sample.own_model import sample_own_model
from implicit_diffusion.commands.shared.conditioning import (
    CLASS,
    Conditioning,
    ConditioningSpec,
    conditioning,
    prompts_of,
)
from implicit_diffusion.commands.shared.models.factories import check_models, open_own_model
from implicit_diffusion.commands.shared.models.read_model import read_model
from implicit_diffusion.commands.shared.models.sizes import call_of, sized
from implicit_diffusion.commands.shared.pictures import displayed
from implicit_diffusion.commands.shared.prompt_files import read_prompts
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import at_once
from implicit_diffusion.extras import require
from implicit_diffusion.models.chain_file import TrainedChain, read_chain
from implicit_diffusion.models.checkpoints import Checkpoint, find_checkpoint
from implicit_diffusion.models.energy_model import is_energy_model
from implicit_diffusion.models.parts import load_scheduler
from implicit_diffusion.models.pretrained import Pretrained, load_pretrained
from implicit_diffusion.models.prompts import assembled
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import progress
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.samplers.chain import Chain

STEPS = 50  # of a pipeline, by default

Draw = Callable[[range], list[Any]]  # the images of these numbers


@main_only
def run(config: Config) -> Path:
    """Write the grid and return its path; of several processes, the main one draws.

    Raises:
        InvalidInputError: a number is out of range; the file exists or cannot be written; there is no such model, or
            it does not fit the prompts.
    """
    config.check()
    if is_energy_model(config.model):
        if config.prompts is not None:
            raise InvalidInputError(f"--model {config.model} takes no --prompts: it is an energy-based model")
        return sample_energy_model(Path(config.model), config.num, config.out, config.num_steps, config.seed)
    if config.trust_model:
        check_models(config, Path(config.model), trusted=True)
    if config.exact:
        from implicit_diffusion.commands.sample.exact import sample_exactly

        return sample_exactly(config, STEPS)
    own = open_own_model(config.model)
    if own is not None:
        return sample_own_model(own, config)
    checkpoint = find_checkpoint(config.model)
    trained = read_chain(checkpoint.folder)
    device = find_device(config.device)
    drawing = _read if checkpoint.family.probed else _known
    draw, at_a_time = drawing(config, checkpoint, trained, device)
    batches = [range(first, min(first + at_a_time, config.num)) for first in range(0, config.num, at_a_time)]
    images: list[Any] = []
    with progress(config.num, "sampling") as bar:
        for batch in batches:
            images += draw(batch)
            bar.update(advance=len(batch))
    if trained is not None and config.num_steps not in (None, len(trained.table)):
        print(f"fine-tuned for {trained.table.name}; these are {config.num_steps} steps of the folder's pipeline")
    write_grid(images, config.out)
    print(config.out)
    return config.out


def _known(
    config: Config, checkpoint: Checkpoint, trained: TrainedChain | None, device: torch.device
) -> tuple[Draw, int]:
    """The function that draws from a model of a family that is known by hand, and how many images at a time.

    It draws by the chain that the model was trained on, where N is its number of steps.
    """
    pretrained = sized(load_pretrained(config.model), *_sizes(config, trained))
    if (config.prompts is None) == (pretrained.condition == "prompts"):
        what = "needs --prompts FILE" if config.prompts is None else "takes no --prompts"
        raise InvalidInputError(
            f"--model {config.model} {what}: it is conditioned on {pretrained.condition or 'nothing'}"
        )
    steps = _steps(config, trained, pretrained.scheduler)
    for network in filter(None, (pretrained.denoiser, pretrained.decoder)):
        network.to(device)
    check_pictures(pretrained, config.model, config.out)
    guidance, null_class = (None, None) if trained is None else (trained.guidance, trained.null_class)
    conditions = ConditioningSpec(config.model, config.prompts, guidance, null_class)
    at_a_time = at_once(pretrained.event_shape)
    if trained is not None and steps == len(trained.table):
        given = conditioning(conditions, pretrained, device)
        return _by_chain(pretrained, given, trained, Noise(config.seed)), at_a_time
    eta = {} if trained is None or trained.eta is None else {"eta": trained.eta}
    generator = torch.Generator().manual_seed(config.seed)
    return _by_pipeline(pretrained, conditions, steps, eta, generator, device), at_a_time


def _read(
    config: Config, checkpoint: Checkpoint, trained: TrainedChain | None, device: torch.device
) -> tuple[Draw, int]:
    """The same for a model whose chain is read off its pipeline."""
    size, frames = _sizes(config, trained)
    conditions = ConditioningSpec(config.model, config.prompts, None if trained is None else trained.guidance)
    steps = _steps(config, trained, load_scheduler(checkpoint, config.model))
    if trained is not None and steps == len(trained.table):
        read = read_model(checkpoint, conditions, steps, sampler="own", size=size, frames=frames)
        for network in filter(None, (read.pretrained.denoiser, read.pretrained.decoder)):
            network.to(device)
        draw = _by_chain(read.pretrained, read.conditioning, trained, Noise(config.seed))
        return draw, at_once(read.pretrained.event_shape)
    given, _ = prompts_of(conditions, checkpoint.family.condition)
    call = call_of(checkpoint.family, size, frames, conditions.guidance)
    pipeline = assembled(checkpoint, {}).to(device)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(config.seed)

    def draw_one(numbers: range) -> list[Any]:
        prompt = given[numbers.start % len(given)] if given else None
        texts = {} if prompt is None else {"prompt": str(prompt)}
        texts |= {"negative_prompt": prompt.negative} if prompt is not None and prompt.negative else {}
        options = {"num_inference_steps": steps, "generator": generator, "output_type": "pt", "return_dict": False}
        (images, *_) = pipeline(**texts, **options, **call)
        return shown_as_pictures(images)

    return draw_one, 1


def _sizes(config: Config, trained: TrainedChain | None) -> tuple[tuple[int, int] | None, int | None]:
    """Height and width, and frames: as asked for, or as the model was fine-tuned for."""
    if trained is None:
        return config.size, config.frames
    return config.size or trained.size, config.frames or trained.num_frames


def _steps(config: Config, trained: TrainedChain | None, scheduler: Any) -> int:
    """N, as asked for, or as the model was fine-tuned for."""
    steps = config.num_steps or (STEPS if trained is None else len(trained.table))
    most = scheduler.config.num_train_timesteps
    if steps > most:
        raise InvalidInputError(
            f"--num-steps must be at most the {most} timesteps that the model was trained on, got {steps}"
        )
    return steps


def _by_chain(pretrained: Pretrained, given: Conditioning, trained: TrainedChain, noise: Noise) -> Draw:
    """Images by the chain that the model was trained on."""

    @torch.no_grad()
    def draw(numbers: range) -> list[Any]:
        chain = Chain(
            given.around(pretrained.denoiser, given.guidance),
            trained.table,
            pretrained.event_shape,
            condition=None if given.drawn is None else lambda *which: in_turn(given, numbers),
        )
        x = chain.sample(noise, len(numbers), numbers.start)
        return pictures(displayed(x, pretrained.decoder))

    return draw


def _by_pipeline(
    pretrained: Pretrained,
    conditions: ConditioningSpec,
    steps: int,
    eta: dict[str, float],
    generator: torch.Generator,
    device: torch.device,
) -> Draw:
    """Images by the model's pipeline."""
    pipeline = pretrained.pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": steps, "generator": generator}
    options |= eta if pretrained.family.passes_eta else {}
    if pretrained.condition is None:
        return lambda numbers: list(pipeline(batch_size=len(numbers), **options).images)
    guidance = conditions.guidance
    options["guidance_scale"] = pretrained.family.guidance if guidance is None else guidance
    if conditions.prompts is not None:
        prompts = read_prompts(conditions.prompts)

        def draw(numbers: range) -> list[Any]:
            given = [prompts[i % len(prompts)] for i in numbers]
            negative = [prompt.negative for prompt in given]
            texts = {"prompt": [*map(str, given)], "negative_prompt": negative if any(negative) else None}
            return list(pipeline(**texts, **options).images)

        return draw
    given = conditioning(conditions, pretrained, device)
    if pretrained.decoder is not None:
        return lambda numbers: list(pipeline(in_turn(given, numbers)[CLASS].tolist(), **options).images)
    return lambda numbers: _labelled(pretrained, given, numbers, steps, generator, eta)


@torch.no_grad()
def _labelled(
    pretrained: Pretrained,
    given: Conditioning,
    numbers: range,
    steps: int,
    generator: torch.Generator,
    eta: dict[str, float],
) -> list[Any]:
    """What a DDPMPipeline would do if it accepted class labels."""
    require("diffusers")
    from diffusers.utils import pt_to_pil

    denoiser, scheduler = given.around(pretrained.denoiser, given.guidance), pretrained.scheduler
    device = next(denoiser.parameters()).device
    labels = {name: value.to(device) for name, value in in_turn(given, numbers).items()}
    scheduler.set_timesteps(steps, device=device)
    x = torch.randn((len(numbers), *pretrained.event_shape), generator=generator).to(device)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        u = denoiser(scheduler.scale_model_input(x, t), t.expand(len(numbers)), **labels)
        x = scheduler.step(u, t, x, generator=generator, **eta).prev_sample
    return list(pt_to_pil(x))
