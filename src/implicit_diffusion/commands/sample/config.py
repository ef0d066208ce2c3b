"""The options of `sample`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.shared.models.factories import factory_of
from implicit_diffusion.commands.shared.ranges import at_least, check_size, option, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import check_place
from implicit_diffusion.models.energy_model import is_energy_model

OF_EXACT = ("reward", "reward_python", "kl_weight", "method", "particles", "trust_reward")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Config:
    """Draw a grid of images from a model."""

    model: str = "digits"
    """The model: "digits" (shipped), a folder such as RUN/model, or a hub id owner/name.
    A folder holds a diffusers pipeline, an energy-based model, or the weights of a network of your own.
    Such a network before any fine-tuning is "FILE.py:factory", as for finetune."""
    num: int = 64
    """Number of images."""
    out: Path = Path("grid.png")
    """File to write: a .png, .jpg or .webp picture.
    Of an energy-based model or a network of your own it may be a .npy array.
    An existing file is never overwritten."""
    prompts: Path | None = None
    """File with one prompt per line, for models that are conditioned on text; images use the prompts in turn.
    If its name ends in .jsonl, its lines are JSON, as for `finetune --prompts`.
    With --exact, by default the prompts of the run."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels; by default those that the model was fine-tuned for, or its own."""
    frames: int | None = None
    """Number of frames of a video, likewise; a few of them are shown side by side."""
    num_steps: int | None = None
    """Number of sampling steps; by default the number that the model was fine-tuned for.
    With any other number, and for a model that was never fine-tuned, the pipeline of the model draws the images.
    Its default is 50 steps."""
    exact: bool = False
    """Draw from the law that fine-tuning only comes near, in which images are e^(reward/β) times as likely.
    With RUN/model, reward and β are those of its run.
    Any other model is steered without training, with --reward and --kl-weight.
    How well it went is written to a .json file beside the picture."""
    method: Literal["metropolis", "smc"] | None = None
    """How --exact draws. By default "metropolis": each image is proposed many times, and accepted by its weight.
    Sequential Monte Carlo, "smc", resamples particles on their way, by rewards of predicted images."""
    particles: int | None = None
    """Number of trajectories for each image of --exact, by default 64; the more, the nearer to the law."""
    kl_weight: float | None = None
    """Weight β of the KL divergence for --exact, by default that of the run."""
    reward: tuple[str, ...] = field(default=(), metadata={"repeatable": True})
    """The reward for --exact of a model that is not part of a run, in any form that finetune --reward takes."""
    reward_python: Path | None = None
    """The python of another environment to compute your own --reward with, as in finetune."""
    trust_reward: bool = False
    """Run the code of the reward that the run names, even if it lies there, has changed, or is not known here."""
    trust_model: bool = False
    """Run the code that makes a network of your own, FILE.py:factory, which a folder names, in the same cases."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """Device to compute on, such as "cpu" or "cuda"; "auto" uses an accelerator if there is one.
    Samples of energy-based models are drawn on the CPU."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range, or `out` cannot be written."""
        at_least(self, num=1, num_steps=1, seed=0, particles=2, frames=1)
        check_size(self.size)
        positive(self, "kl_weight")
        given = [
            each.name for each in fields(self) if each.name in OF_EXACT and getattr(self, each.name) != each.default
        ]
        if given and not self.exact:
            raise InvalidInputError(f"{option(given[0])} is for --exact; add that, or leave {option(given[0])} out")
        if self.exact and is_energy_model(self.model):
            raise InvalidInputError(
                f"--exact is for diffusion and flow models, and --model {self.model} is an energy-based model; leave "
                "--exact out, or tilt its law with the command tilt"
            )
        if self.out.exists():
            raise InvalidInputError(f"--out {self.out} exists; name a new file")
        if self.exact and self.numbers.exists():
            raise InvalidInputError(f"--out {self.out}: {self.numbers}, the numbers beside it, exists; name a new file")
        if self.out.suffix.lower() not in (*PICTURES, ".npy"):
            raise InvalidInputError(f"--out {self.out} must end in {', '.join(PICTURES)}, or .npy")
        arrays = is_energy_model(self.model) or factory_of(self.model) is not None
        if self.out.suffix == ".npy" and not arrays:
            raise InvalidInputError(
                f"--out {self.out}: only an energy-based model, or a network of your own, is drawn to .npy; "
                "name a picture"
            )
        check_place(self.out.parent)

    @property
    def numbers(self) -> Path:
        """The file beside the picture that says how well --exact went."""
        return self.out.with_suffix(".json")
