"""The options of `pretrain`, with their defaults, on one screen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from implicit_diffusion.commands.pretrain.network import noise_schedule
from implicit_diffusion.commands.shared.ranges import at_least, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.runs.trackers.opening import TrackerName
from implicit_diffusion.tables.scheduler import read_table


@dataclass(frozen=True)
class Config:
    """Pretrain a diffusion model on images.

    The defaults are those of the digits model that is shipped; on the same processor they give it again bit for bit.
    """

    data: str = "digits"
    """The images: "digits", "fashion-mnist", a folder of images or IDX files, an array, or a hub id.
    Arrays are FILE.npy, FILE.npz:NAME or FILE-ubyte.gz; examples of hub ids are ylecun/mnist and uoft-cs/cifar10."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/pretrain-<data>."""
    track: tuple[TrackerName, ...] = ()
    """Where else to show the numbers and pictures of the training.
    "tensorboard" writes event files into the folder of the run; "wandb" sends them to Weights & Biases."""
    size: tuple[int, int] | None = None
    """Height and width to scale the images to; by default their own, rounded so that the U-Net can halve them."""
    classes: bool = False
    """Condition the model on classes: the subfolders of a folder of images, or the labels of digits and arrays."""
    steps: int = 3000
    """Number of optimizer steps."""
    minutes: float | None = None
    """Stop training after so many minutes, if not all steps are made by then; time before a `resume` counts as well.
    Choose --steps so that they fit: the learning rate decays over all of them."""
    batch: int = 64
    """Number of images per optimizer step."""
    lr: float = 2e-3
    """Learning rate after a linear warm-up over 200 steps; it then decays to zero along a cosine."""
    ema_decay: float = 0.999
    """Decay rate, below 1, of the moving average of the weights; the average is what is saved."""
    dropout: float = 0.1
    """Dropout rate in the residual blocks of the U-Net."""
    channels: tuple[int, ...] | None = None
    """Number of channels at each level of the U-Net, multiples of 8; by default they follow the size of the images."""
    prediction_type: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"
    """What the network predicts: the velocity, the noise, or the clean image."""
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    """Shape of the noise schedule, by its name in diffusers."""
    train_timesteps: int = 1000
    """Number T of time steps of the noise schedule."""
    seed: int = 0
    """Seed of all random numbers."""
    chains: tuple[int, ...] = (10, 50)
    """Numbers of sampling steps with which the model is evaluated after training."""
    samples: int | None = None
    """Number of samples to judge for each of --chains; by default 2000 digits, and none of other images.
    Of images that are not judged, one page is drawn."""
    keep: int = KEEP
    """Number of checkpoints to keep: should the newest be damaged, an older one continues the run."""
    device: str | None = None
    """Device to compute on, such as "cpu" or "cuda".
    By default it is the CPU for digits, and an accelerator for other images if there is one."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=1, batch=1, train_timesteps=1, samples=2, seed=0, keep=1)
        words = " ".join(map(str, self.channels or ()))
        if self.channels is not None and (not self.channels or any(c < 8 or c % 8 for c in self.channels)):
            raise InvalidInputError(f"--channels must be positive multiples of 8, got {words or 'none'}")
        if self.classes and self.channels is not None and max(self.channels) == 8:
            # each of the eight groups is one channel, less its own mean
            raise InvalidInputError(
                f"--channels {words} makes a network that cannot see classes: it normalises every channel by itself; "
                "give 16 or more to one level at least"
            )
        positive(self, "lr", "minutes")
        for name in ("ema_decay", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInputError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")
        if not self.chains or min(self.chains) < 1:
            raise InvalidInputError(f"--chains must be integers ≥ 1, got {' '.join(map(str, self.chains)) or 'none'}")
        schedule = noise_schedule(self.train_timesteps, self.beta_schedule, self.prediction_type)
        for num_steps in self.chains:
            try:
                read_table(schedule, num_steps)
            except InvalidInputError as error:
                raise InvalidInputError(f"--chains {num_steps}: {error}") from error
