"""Draw a grid of images from a diffusers folder: by the chain that it was fine-tuned for, else with plain diffusers.

A fine-tuned model comes with `chain.json`, the table of its chain. The network then runs on all rows of that very
table, whether or not diffusers has a pipeline for it, under the prompts or class labels in turn and with the guidance
that it was trained under. Another number of steps is another chain, for which the folder's pipeline is asked.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.denoisers.pretrained import Pretrained, load_pretrained
from implicit_diffusion.denoisers.table import ChainTable
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import finetune_config, sample_energy
from implicit_diffusion.experiments.conditioning import CLASS, Conditioning, conditioning, read_prompts
from implicit_diffusion.experiments.energy_model import is_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain

CHAIN_FILE = "chain.json"  # beside model_index.json: the chain that a pipeline was trained for


@dataclass(frozen=True)
class Config:
    """Draw a grid of images from a model."""

    model: str = "digits"
    """"digits" (shipped), a folder such as RUN/model, of diffusers or an energy-based model, or a hub id owner/name."""
    num: int = 64
    """Images."""
    out: Path = Path("grid.png")
    """Picture to write, or of an energy-based model FILE.npy; an existing file is left alone."""
    prompts: Path | None = None
    """Text file with a prompt per line, for text-conditional models; images take them in turn."""
    num_steps: int | None = None
    """Steps of the sampler. By default the chain that the model was fine-tuned for; else the folder's own pipeline, by
    default in 50 steps."""
    seed: int = 0


def run(config: Config) -> Path:
    """Write the grid and return its path.

    Raises:
        InvalidInputError: no images asked for, an existing file, no such model, or prompts where it takes none.
    """
    from diffusers.utils import make_image_grid

    if config.num < 1:
        raise InvalidInputError(f"--num must be an integer ≥ 1, got {config.num}")
    if config.out.exists():
        raise InvalidInputError(f"--out {config.out} exists; name a new file")
    if is_energy_model(config.model):
        if config.prompts is not None:
            raise InvalidInputError(f"--model {config.model} takes no --prompts: it is an energy-based model")
        return sample_energy.sample(Path(config.model), config.num, config.out, config.num_steps, config.seed)
    pretrained, trained_for = load_pretrained(config.model), read_chain(config.model)
    if (config.prompts is None) == (pretrained.condition == "prompts"):
        what = "needs --prompts FILE" if config.prompts is None else "takes no --prompts"
        raise InvalidInputError(
            f"--model {config.model} {what}: it is conditioned on {pretrained.condition or 'nothing'}"
        )
    steps = config.num_steps or trained_for.get("num_steps", 50)
    if "table" in trained_for and steps == trained_for["num_steps"]:
        images = _by_chain(pretrained, config, trained_for)
    else:
        images = _by_pipeline(pretrained, config, steps, trained_for)
        if "table" in trained_for:
            print(f"fine-tuned for {trained_for['table']['name']}; these are {steps} steps of the folder's pipeline")
    columns = math.ceil(math.sqrt(config.num))
    rows = math.ceil(config.num / columns)
    blank = images[0].copy()
    blank.paste(0, (0, 0, *blank.size))
    size = max(64, max(images[0].size))
    images = [image.resize((size, size), resample=0) for image in [*images, *[blank] * (rows * columns - config.num)]]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows, columns).save(config.out)
    print(config.out)
    return config.out


@torch.no_grad()
def _by_chain(pretrained: Pretrained, config: Config, trained_for: dict[str, Any]) -> list[Any]:
    """Images by the chain that the model was trained on."""
    from diffusers.utils import pt_to_pil

    given, table = _given(pretrained, config, trained_for), ChainTable.from_dict(trained_for["table"])

    def condition(noise: Noise, batch: int, index: int) -> dict[str, Tensor]:
        return _in_turn(given, batch)

    chain = Chain(
        given.around(pretrained.denoiser),
        table,
        pretrained.event_shape,
        condition=None if given.drawn is None else condition,
    )
    x = chain.sample(Noise(config.seed), config.num)
    return list(pt_to_pil(x if pretrained.decoder is None else pretrained.decoder(x)))


def _by_pipeline(pretrained: Pretrained, config: Config, steps: int, trained_for: dict[str, Any]) -> list[Any]:
    """Images by the model's pipeline."""
    pipeline, generator = pretrained.pipeline, torch.Generator().manual_seed(config.seed)
    pipeline.set_progress_bar_config(disable=True)
    eta = {"eta": trained_for["eta"]} if "eta" in trained_for else {}
    options: dict[str, Any] = {"num_inference_steps": steps, "generator": generator}
    options |= eta if pretrained.family.passes_eta else {}
    if pretrained.condition is None:
        return list(pipeline(batch_size=config.num, **options).images)
    options["guidance_scale"] = trained_for.get("guidance", pretrained.family.guidance)
    if config.prompts is not None:
        prompts = read_prompts(config.prompts)
        return list(pipeline([prompts[i % len(prompts)] for i in range(config.num)], **options).images)
    given = _given(pretrained, config, trained_for)
    if pretrained.decoder is not None:
        return list(pipeline(_in_turn(given, config.num)[CLASS].tolist(), **options).images)
    return _labelled(pretrained, given, config.num, steps, generator, eta)


@torch.no_grad()
def _labelled(
    pretrained: Pretrained,
    given: Conditioning,
    num: int,
    steps: int,
    generator: torch.Generator,
    eta: dict[str, float],
) -> list[Any]:
    """What a DDPMPipeline would do if it took class labels."""
    from diffusers.utils import pt_to_pil

    denoiser, labels, scheduler = given.around(pretrained.denoiser), _in_turn(given, num), pretrained.scheduler
    scheduler.set_timesteps(steps)
    x = torch.randn((num, *pretrained.event_shape), generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        u = denoiser(scheduler.scale_model_input(x, t), t.expand(num), **labels)
        x = scheduler.step(u, t, x, generator=generator, **eta).prev_sample
    return list(pt_to_pil(x))


def _given(pretrained: Pretrained, config: Config, trained_for: dict[str, Any]) -> Conditioning:
    """Prompts or labels, and the guidance that the model was trained under."""
    asked = finetune_config.Config(
        prompts=config.prompts,
        model=config.model,
        guidance=trained_for.get("guidance"),
        null_class=trained_for.get("null_class"),
    )
    return conditioning(asked, pretrained, torch.device("cpu"))


def _in_turn(given: Conditioning, num: int) -> dict[str, Tensor]:
    """The values of the condition, one after the other."""
    assert given.drawn is not None
    return {given.drawn.name: given.drawn.values[torch.arange(num) % len(given.drawn.values)]}


def write_chain(folder: Path, table: ChainTable, **options: int | float) -> None:
    """Note beside a pipeline what it was fine-tuned for: num_steps, its table, eta of DDIM, guidance and null class."""
    chain = {"num_steps": len(table), **options, "table": table.to_dict()}
    (folder / CHAIN_FILE).write_text(json.dumps(chain) + "\n", encoding="utf-8")


def read_chain(model: str) -> dict[str, Any]:
    """The chain that a folder was fine-tuned for; empty where nothing is said."""
    path = Path(model) / CHAIN_FILE
    return json.loads(path.read_text()) if path.is_file() else {}
