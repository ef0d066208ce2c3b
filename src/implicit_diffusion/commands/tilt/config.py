"""The options of `tilt`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.rewards.elsewhere import check_python
from implicit_diffusion.commands.shared.ranges import at_least, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.runs.trackers.opening import TrackerName
from implicit_diffusion.scorers import TIMEOUT

Arm = Literal["unweighted", "weighted"]
ARMS: tuple[Arm, ...] = ("unweighted", "weighted")  # the first is the one to use


@dataclass(frozen=True)
class Config:
    """Fine-tune an energy-based model of data in the plane for a reward, with a penalty on the KL divergence."""

    model: Path
    """The model/ folder of a run of `implicit-diffusion ebm`."""
    reward: str = "half-plane"
    """The reward: "half-plane", which is 1 where x_1 ≥ 0, or your own "FILE.py:function".
    It is called with points of shape (n, 2), and returns shape (n,); it needs no gradient.
    A class may be given literal arguments, as in "FILE.py:Class(weight=2)"."""
    reward_python: Path | None = None
    """The python of another environment, such as ENVIRONMENT/bin/python, to compute your own reward with.
    It runs in a process of its own, and needs NumPy and safetensors."""
    reward_timeout: float = TIMEOUT
    """Seconds that the process of --reward-python may take to load, and to score a batch, before it is restarted."""
    kl_weights: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 5.0)
    """KL weights w to train with, in units of reward per nat."""
    arms: tuple[Arm, ...] = ARMS
    """Ways of training to compare; the models of the first one are saved."""
    steps: int = 2000
    """Number of updates of the parameters θ."""
    particles: int = 512
    """Number of particles, a multiple of 8."""
    lr: float = 5e-3
    """Learning rate of Adam at the start; it decays to zero along a cosine."""
    seeds: int = 5
    """Number of runs for each of --arms and --kl-weights; the models of the first run are saved."""
    seed: int = 0
    """Seed of the first run; the other runs use the numbers after it."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/tilt-<time>."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=1, particles=16, seeds=1, seed=0, keep=1)
        if self.particles % 8:
            raise InvalidInputError(f"--particles must be a multiple of 8, got {self.particles}")
        if not self.kl_weights or not all(0 < w < math.inf for w in self.kl_weights):
            raise InvalidInputError(f"--kl-weights must be positive and finite, got {self.kl_weights}")
        if len(set(self.kl_weights)) < len(self.kl_weights):
            raise InvalidInputError(f"--kl-weights must differ from each other, got {self.kl_weights}")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise InvalidInputError(f"--arms must be one or both of {' '.join(ARMS)}, got {self.arms}")
        positive(self, "lr", "reward_timeout")
        check_python([self.reward], self.reward_python)
