"""The options of `score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from implicit_diffusion.commands.shared.ranges import at_least
from implicit_diffusion.errors import InvalidInputError


@dataclass(frozen=True)
class Config:
    """Compute log-likelihoods of data under a trained energy-based model."""

    model: Path
    """The model/ folder of a run of `implicit-diffusion ebm`."""
    data: str
    """FILE.npy, FILE.npz, FILE.csv or FILE.safetensors, with data of the same shape and units as those of training.
    If the model was trained on dequantised data, give discrete values; the noise is added here."""
    out: Path | None = None
    """New .npy file to write the log-likelihood of each data point to, in nats."""
    seed: int = 0
    """Seed of the noise that is added to discrete values; it has no effect on other data."""

    def check(self) -> None:
        """Raise `InvalidInputError` where the seed is out of range, or `out` is not a new .npy file."""
        at_least(self, seed=0)
        if self.out is not None and (self.out.exists() or self.out.suffix != ".npy"):
            raise InvalidInputError(f"--out {self.out} must name a new .npy file")
