"""The options of `sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from implicit_diffusion.commands.shared.ranges import at_least
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import check_place
from implicit_diffusion.models.energy_model import is_energy_model

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
    """File with one prompt per line, for models that are conditioned on text; images use the prompts in turn.
    If its name ends in .jsonl, its lines are JSON, as for `finetune --prompts`."""
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
