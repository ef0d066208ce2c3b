"""Draw a grid of images from a diffusers folder, with plain diffusers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from implicit_diffusion.denoisers.pretrained import load_pretrained
from implicit_diffusion.errors import InvalidInputError

CHAIN_FILE = "chain.json"  # beside model_index.json: the chain that a pipeline was trained for


@dataclass(frozen=True)
class Config:
    """Draw a grid of images from a model, with plain diffusers."""

    model: str = "digits"
    """"digits" (shipped), a diffusers folder such as RUN/model, or a hub id owner/name."""
    num: int = 64
    """Images."""
    out: Path = Path("grid.png")
    """Picture to write; an existing one is left alone."""
    num_steps: int | None = None
    """Steps of the sampler; by default those that the model was fine-tuned for, or 50."""
    seed: int = 0


def run(config: Config) -> Path:
    """Write the grid and return its path.

    Raises:
        InvalidInputError: no images asked for, an existing file, or no such model.
    """
    from diffusers.utils import make_image_grid

    if config.num < 1:
        raise InvalidInputError(f"--num must be an integer ≥ 1, got {config.num}")
    if config.out.exists():
        raise InvalidInputError(f"--out {config.out} exists; name a new file")
    pipeline = load_pretrained(config.model).pipeline
    pipeline.set_progress_bar_config(disable=True)
    trained_for = read_chain(config.model)
    options = {"eta": trained_for["eta"]} if "eta" in trained_for else {}
    images = pipeline(
        batch_size=config.num,
        num_inference_steps=config.num_steps or trained_for.get("num_steps", 50),
        generator=torch.Generator().manual_seed(config.seed),
        **options,
    ).images
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


def write_chain(folder: Path, **chain: int | float) -> None:
    """Note beside a pipeline what it was fine-tuned for: num_steps, and eta for DDIM."""
    (folder / CHAIN_FILE).write_text(json.dumps(chain) + "\n", encoding="utf-8")


def read_chain(model: str) -> dict[str, Any]:
    """The chain that a folder was fine-tuned for; empty where nothing is said."""
    path = Path(model) / CHAIN_FILE
    return json.loads(path.read_text()) if path.is_file() else {}
