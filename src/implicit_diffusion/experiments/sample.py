"""Draw a grid of images from a diffusers folder: by the chain that it was fine-tuned for, else with plain diffusers.

A fine-tuned model comes with `chain.json`, the table of its chain. The network then runs on all rows of that very
table, whether or not diffusers has a pipeline for it. Another number of steps is another chain, for which the folder's
pipeline is asked.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from implicit_diffusion.denoisers.pretrained import load_pretrained
from implicit_diffusion.denoisers.table import ChainTable
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import sample_energy
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
    num_steps: int | None = None
    """Steps of the sampler. By default the chain that the model was fine-tuned for; else the folder's own pipeline, by
    default in 50 steps."""
    seed: int = 0


def run(config: Config) -> Path:
    """Write the grid and return its path.

    Raises:
        InvalidInputError: no images asked for, an existing file, or no such model.
    """
    from diffusers.utils import make_image_grid, pt_to_pil

    if config.num < 1:
        raise InvalidInputError(f"--num must be an integer ≥ 1, got {config.num}")
    if config.out.exists():
        raise InvalidInputError(f"--out {config.out} exists; name a new file")
    if is_energy_model(config.model):
        return sample_energy.sample(Path(config.model), config.num, config.out, config.num_steps, config.seed)
    pretrained, trained_for = load_pretrained(config.model), read_chain(config.model)
    num_steps = config.num_steps or trained_for.get("num_steps", 50)
    if "table" in trained_for and num_steps == trained_for["num_steps"]:
        table = ChainTable.from_dict(trained_for["table"])
        images = pt_to_pil(
            Chain(pretrained.denoiser, table, pretrained.event_shape).sample(Noise(config.seed), config.num)
        )
    else:
        pipeline = pretrained.pipeline
        pipeline.set_progress_bar_config(disable=True)
        options = {"eta": trained_for["eta"]} if "eta" in trained_for else {}
        generator = torch.Generator().manual_seed(config.seed)
        images = pipeline(batch_size=config.num, num_inference_steps=num_steps, generator=generator, **options).images
        if "table" in trained_for:
            print(
                f"fine-tuned for {trained_for['table']['name']}; these are {num_steps} steps of the folder's pipeline"
            )
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


def write_chain(folder: Path, table: ChainTable, **options: float) -> None:
    """Note beside a pipeline what it was fine-tuned for: num_steps, the table, and eta for DDIM."""
    chain = {"num_steps": len(table), **options, "table": table.to_dict()}
    (folder / CHAIN_FILE).write_text(json.dumps(chain) + "\n", encoding="utf-8")


def read_chain(model: str) -> dict[str, Any]:
    """The chain that a folder was fine-tuned for; empty where nothing is said."""
    path = Path(model) / CHAIN_FILE
    return json.loads(path.read_text()) if path.is_file() else {}
