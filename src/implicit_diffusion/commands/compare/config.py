"""The options of `compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from implicit_diffusion.commands.shared.ranges import at_least
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.runs.trackers.opening import TrackerName

ProblemName = Literal["gaussian", "brightness", "brightness-rounded", "jpeg-size"]
MethodName = Literal[
    "adjoint",
    "adjoint-queue",
    "full-backprop",
    "draft",
    "alignprop",
    "adjoint-matching",
    "score",
    "score-queue",
    "surrogate",
    "surrogate-queue",
    "ddpo",
    "grpo",
    "guidance",
    "best-of",
]
PROBLEMS: tuple[ProblemName, ...] = get_args(ProblemName)
NAMES: tuple[MethodName, ...] = get_args(MethodName)


@dataclass(frozen=True)
class Config:
    """Compare the ways of fine-tuning for a reward: quality and price of their gradients, and what they reach."""

    problems: tuple[ProblemName, ...] = PROBLEMS
    """What to train for.
    "gaussian" is a linear Gaussian chain with a quadratic reward, whose exact gradient is a closed form.
    The others are the shipped digits with three rewards.
    "brightness-rounded" (the brightness in whole per cents) and "jpeg-size" (of their file) have no gradient."""
    methods: tuple[MethodName, ...] = NAMES
    """Methods to compare; each is left out where it does not apply, and full-backprop from the training."""
    num_steps: int = 10
    """Number N of sampling steps."""
    batch: int = 8
    """Number of samples per gradient; with grpo a multiple of 4, the size of its groups."""
    depth: int = 3
    """Number K of the last sampling steps that the method "draft" differentiates."""
    batches: int = 32
    """Number of gradients of each method whose bias and variance are measured; 0 leaves this part out."""
    updates: int = 50
    """Budget of each training: the network evaluations that so many updates of the method "adjoint" make.
    The training is left out if it is 0."""
    points: int = 5
    """Number of measurements of J during each training."""
    held_out: int = 128
    """Number of initial noises that J is measured on."""
    factor: float = 3.0
    """Ratio of neighbouring learning rates of the search."""
    widest: int = 8
    """Largest number of learning rates that the search of one method may try."""
    seeds: int = 3
    """Number of trainings with the learning rate that the search has chosen."""
    seed: int = 0
    """Seed of the first training; the others use the numbers after it, and the search one of its own."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/compare-<time>."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, num_steps=2, batch=4, depth=2, batches=0, updates=0, points=1, held_out=8, widest=3)
        at_least(self, seeds=1, seed=0, keep=1)
        for name in ("problems", "methods"):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen):
                raise InvalidInputError(f"--{name} must be different names, at least one, got {' '.join(chosen)}")
        if "grpo" in self.methods and self.batch % 4:
            raise InvalidInputError(f"--batch must be a multiple of 4, got {self.batch}: grpo makes groups of 4")
        if self.depth > self.num_steps:
            raise InvalidInputError(f"--depth must be at most --num-steps, {self.num_steps}, got {self.depth}")
        if not 1 < self.factor < float("inf"):
            raise InvalidInputError(f"--factor must be above 1 and finite, got {self.factor}")
        if self.batches == 1:
            raise InvalidInputError("--batches must be 0 or at least 2, got 1: one gradient has no variance")
        if not self.batches and not self.updates:
            raise InvalidInputError("--batches and --updates are both 0: there is nothing to compare")
