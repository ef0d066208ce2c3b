"""The options of `theory`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.shared.ranges import at_least
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.runs.trackers.opening import TrackerName

Part = Literal["rates", "floors", "queue", "lag"]
PARTS: tuple[Part, ...] = ("rates", "floors", "queue", "lag")


@dataclass(frozen=True)
class Config:
    """Measure what the paper proves: rates and floors of the single loop, the queue, and the lag of particles."""

    parts: tuple[Part, ...] = PARTS
    """Parts to measure: rates under the paper's schedules, floors of constant steps, the queue, lags of particles."""
    steps: int = 10_000
    """Number K of iterations under the paper's schedules; floors of constant steps are measured over a third of it."""
    copies: int = 64
    """Number of independent runs of each problem, all computed at once; they give the confidence intervals."""
    particles: int = 24
    """Number n of particles: the noise of Γ, and with it what the schedules have to overcome, is of order 1/n."""
    seed: int = 0
    """Seed of the first run; the other runs use the numbers after it."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/theory-<time>."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=100, copies=2, particles=8, seed=0, keep=1)
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise InvalidInputError(f"--parts must be different names, at least one, got {' '.join(self.parts)}")
