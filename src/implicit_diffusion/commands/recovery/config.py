"""The options of `recovery`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.shared.ranges import at_least, positive
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.runs.trackers.opening import TrackerName

TAIL = 500  # updates whose mean is reported
STEP_SIZES = {"hexagon": 0.2, "two-modes": 0.05}  # by default


@dataclass(frozen=True)
class Config:
    """Learn the weights of a mixture of Gaussians from data, by maximum likelihood in a single loop."""

    problem: Literal["hexagon", "two-modes"] = "hexagon"
    """Distribution of the data: particles can cross between the six modes of "hexagon", but not between "two-modes"."""
    steps: int = 5000
    """Number of iterations, each with one step of the sampler and one update."""
    particles: int = 1000
    """Number of particles, and of data points in each iteration, which are drawn from 100,000 of them."""
    seeds: int = 5
    """Number of runs of each method."""
    seed: int = 0
    """Seed of the first run; the other runs use the numbers after it."""
    step_size: float | None = None
    """Step size h of Langevin dynamics; by default 0.2 for "hexagon", 0.05 for "two-modes"."""
    lr: float = 0.1
    """Step size η of gradient descent; two of the methods divide it by 1 + k/100 at iteration k."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/recovery-<time>."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=TAIL, particles=2, seeds=1, seed=0, keep=1)
        positive(self, "step_size", "lr")

    def resolved(self) -> Config:
        """The same with the default step size of the problem."""
        return replace(self, step_size=STEP_SIZES[self.problem] if self.step_size is None else self.step_size)
