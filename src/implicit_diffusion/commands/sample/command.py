"""Draw a grid of images from a diffusers folder: by the chain that it was fine-tuned for, else with plain diffusers.

A fine-tuned model comes with `chain.json`, the table of its chain. The network then runs on all rows of that very
table, whether or not diffusers has a pipeline for it, under the prompts or class labels in turn and with the guidance
that it was trained under. Another number of steps is another chain, for which the folder's pipeline is asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.finetune import config as finetune_config
from implicit_diffusion.commands.sample import energy as sample_energy
from implicit_diffusion.commands.shared.conditioning import CLASS, Conditioning, conditioning, read_prompts
from implicit_diffusion.commands.shared.ranges import at_least
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import NUMBERS
from implicit_diffusion.extras import require
from implicit_diffusion.files.atomic import check_place
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.models.checkpoints import CHAIN
from implicit_diffusion.models.energy_model import is_energy_model
from implicit_diffusion.models.pipeline_files import names_in, real
from implicit_diffusion.models.pretrained import Pretrained, load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import progress
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.table import ChainTable

TILE = 64  # pixels that the longer side of an image takes at least
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Config:
    """Draw a grid of images from a model."""

    model: str = "digits"
    """The model: "digits" (shipped), a folder such as RUN/model, or a hub id owner/name.
    A folder holds a diffusers pipeline or an energy-based model."""
    num: int = 64
    """Number of images."""
    out: Path = Path("grid.png")
    """File to write: a .png, .jpg or .webp picture, or a .npy array from an energy-based model.
    An existing file is never overwritten."""
    prompts: Path | None = None
    """Text file with one prompt per line, for models that are conditioned on text; images use the prompts in turn."""
    num_steps: int | None = None
    """Number of sampling steps; by default the number that the model was fine-tuned for.
    With any other number, and for a model that was never fine-tuned, the pipeline of the model draws the images.
    Its default is 50 steps."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """Device to compute on, such as "cpu" or "cuda"; "auto" uses an accelerator if there is one.
    Samples of energy-based models are drawn on the CPU."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range, or `out` cannot be written."""
        at_least(self, num=1, num_steps=1, seed=0)
        if self.out.exists():
            raise InvalidInputError(f"--out {self.out} exists; name a new file")
        if self.out.suffix.lower() not in (*PICTURES, ".npy"):
            raise InvalidInputError(f"--out {self.out} must end in {', '.join(PICTURES)}, or .npy")
        if self.out.suffix == ".npy" and not is_energy_model(self.model):
            raise InvalidInputError(f"--out {self.out}: only an energy-based model is drawn to .npy; name a picture")
        check_place(self.out.parent)


def run(config: Config) -> Path:
    """Write the grid and return its path.

    Raises:
        InvalidInputError: a number out of range, a file that exists or cannot be written, no such model, or prompts
            where it takes none.
    """
    require("diffusers")
    from diffusers.utils import make_image_grid

    config.check()
    if is_energy_model(config.model):
        if config.prompts is not None:
            raise InvalidInputError(f"--model {config.model} takes no --prompts: it is an energy-based model")
        return sample_energy.sample(Path(config.model), config.num, config.out, config.num_steps, config.seed)
    pretrained = load_pretrained(config.model)
    trained_for = read_chain(pretrained)
    if (config.prompts is None) == (pretrained.condition == "prompts"):
        what = "needs --prompts FILE" if config.prompts is None else "takes no --prompts"
        raise InvalidInputError(
            f"--model {config.model} {what}: it is conditioned on {pretrained.condition or 'nothing'}"
        )
    steps, most = config.num_steps or trained_for.get("num_steps", 50), pretrained.scheduler.config.num_train_timesteps
    if steps > most:
        raise InvalidInputError(f"--num-steps {steps} is more than the {most} timesteps that the model was trained for")
    device = find_device(config.device)
    for network in filter(None, (pretrained.denoiser, pretrained.decoder)):
        network.to(device)
    colours = pretrained.event_shape[0] if pretrained.decoder is None else pretrained.decoder.vae.config.out_channels
    if colours not in (1, 3, 4):
        raise InvalidInputError(f"--model {config.model} has samples of {colours} channels, which no picture shows")
    size = max(1, min(256, NUMBERS // math.prod(pretrained.event_shape)))
    batches = [range(first, min(first + size, config.num)) for first in range(0, config.num, size)]
    with progress(config.num, "sampling") as bar:
        if "table" in trained_for and steps == trained_for["num_steps"]:
            draw = _by_chain(pretrained, config, trained_for, device)
        else:
            draw = _by_pipeline(pretrained, config, steps, trained_for, device)
        images: list[Any] = []
        for batch in batches:
            images += draw(batch)
            bar.update(advance=len(batch))
    if "table" in trained_for and steps != trained_for["num_steps"]:
        print(f"fine-tuned for {trained_for['table'].name}; these are {steps} steps of the folder's pipeline")
    columns = math.ceil(math.sqrt(config.num))
    rows = math.ceil(config.num / columns)
    blank = images[0].copy()
    blank.paste(0, (0, 0, *blank.size))
    times = math.ceil(TILE / max(blank.size))  # every pixel as large as the others
    tile = (times * blank.width, times * blank.height)
    images = [image.resize(tile, resample=0) for image in [*images, *[blank] * (rows * columns - config.num)]]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows, columns).save(config.out)
    print(config.out)
    return config.out


Draw = Callable[[range], list[Any]]  # the images of these numbers


def _by_chain(pretrained: Pretrained, config: Config, trained_for: dict[str, Any], device: torch.device) -> Draw:
    """Images by the chain that the model was trained on."""
    require("diffusers")
    from diffusers.utils import pt_to_pil

    given, table = _given(pretrained, config, trained_for, device), trained_for["table"]

    @torch.no_grad()
    def draw(numbers: range) -> list[Any]:
        chain = Chain(
            given.around(pretrained.denoiser),
            table,
            pretrained.event_shape,
            condition=None if given.drawn is None else lambda *which: _in_turn(given, numbers),
        )
        x = chain.sample(Noise(config.seed), len(numbers), numbers.start)
        return list(pt_to_pil(x if pretrained.decoder is None else pretrained.decoder(x)))

    return draw


def _by_pipeline(
    pretrained: Pretrained, config: Config, steps: int, trained_for: dict[str, Any], device: torch.device
) -> Draw:
    """Images by the model's pipeline."""
    pipeline, generator = pretrained.pipeline.to(device), torch.Generator().manual_seed(config.seed)
    pipeline.set_progress_bar_config(disable=True)
    eta = {"eta": trained_for["eta"]} if "eta" in trained_for else {}
    options: dict[str, Any] = {"num_inference_steps": steps, "generator": generator}
    options |= eta if pretrained.family.passes_eta else {}
    if pretrained.condition is None:
        return lambda numbers: list(pipeline(batch_size=len(numbers), **options).images)
    options["guidance_scale"] = trained_for.get("guidance", pretrained.family.guidance)
    if config.prompts is not None:
        prompts = read_prompts(config.prompts)
        return lambda numbers: list(pipeline([prompts[i % len(prompts)] for i in numbers], **options).images)
    given = _given(pretrained, config, trained_for, device)
    if pretrained.decoder is not None:
        return lambda numbers: list(pipeline(_in_turn(given, numbers)[CLASS].tolist(), **options).images)
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
    """What a DDPMPipeline would do if it took class labels."""
    require("diffusers")
    from diffusers.utils import pt_to_pil

    denoiser, scheduler = given.around(pretrained.denoiser), pretrained.scheduler
    device = next(denoiser.parameters()).device
    labels = {name: value.to(device) for name, value in _in_turn(given, numbers).items()}
    scheduler.set_timesteps(steps, device=device)
    x = torch.randn((len(numbers), *pretrained.event_shape), generator=generator).to(device)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        u = denoiser(scheduler.scale_model_input(x, t), t.expand(len(numbers)), **labels)
        x = scheduler.step(u, t, x, generator=generator, **eta).prev_sample
    return list(pt_to_pil(x))


def _given(pretrained: Pretrained, config: Config, trained_for: dict[str, Any], device: torch.device) -> Conditioning:
    """Prompts or labels, and the guidance that the model was trained under."""
    asked = finetune_config.Config(
        prompts=config.prompts,
        model=config.model,
        guidance=trained_for.get("guidance"),
        null_class=trained_for.get("null_class"),
    )
    return conditioning(asked, pretrained, device)


def _in_turn(given: Conditioning, numbers: range) -> dict[str, Tensor]:
    """The values of the condition, one after the other."""
    assert given.drawn is not None
    return {given.drawn.name: given.drawn.values[torch.tensor(list(numbers)) % len(given.drawn.values)]}


def write_chain(folder: Path, table: ChainTable, **options: int | float) -> None:
    """Note beside a pipeline what it was fine-tuned for: num_steps, its table, eta of DDIM, guidance and null class."""
    chain = {"num_steps": len(table), **options, "table": table.to_dict()}
    (folder / CHAIN).write_text(json.dumps(chain) + "\n", encoding="utf-8")


def read_chain(pretrained: Pretrained) -> dict[str, Any]:
    """The chain that a model was fine-tuned for, its table a `ChainTable`; empty where nothing is said.

    Raises:
        InvalidInputError: the file is damaged.
    """
    checkpoint = pretrained.checkpoint
    if checkpoint is None or CHAIN not in names_in(checkpoint.folder):
        return {}
    path = checkpoint.folder / CHAIN
    try:
        said = read_json(real(checkpoint.folder, path))
        said["table"] = ChainTable.from_dict(said["table"])
        if said["num_steps"] != len(said["table"]):
            raise InvalidInputError(f"num_steps is {said['num_steps']!r}, and its table has {len(said['table'])} rows")
        for name, kinds in {"eta": (int, float), "guidance": (int, float), "null_class": (int,)}.items():
            value = said.get(name)
            if value is not None and (type(value) not in kinds or not math.isfinite(value)):
                raise InvalidInputError(f"{name} is {value!r}")
    except (InvalidInputError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"--model {checkpoint.folder}: {CHAIN}, the chain that it was fine-tuned for, is damaged "
            f"({one_line(error)}); without this file the folder's own pipeline is sampled"
        ) from error
    return said
