"""What `implicit-diffusion score` is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from implicit_diffusion.commands.shared.ranges import at_least
from implicit_diffusion.errors import InvalidInputError


@dataclass(frozen=True)
class Config:
    """Compute log-likelihoods of data under a trained energy-based model."""

    model: Path
    """The model/ folder of an `implicit-diffusion ebm` run."""
    data: str
    """FILE.npy, FILE.npz, FILE.csv or FILE.safetensors with the model's event shape, in the units of its training data.
    For a model of dequantised data, the file holds discrete values, and `score` dequantises them itself."""
    out: Path | None = None
    """Write one log-likelihood per datum, in nats, to this new .npy file."""
    seed: int = 0
    """Seed of the noise that dequantises; other models draw none."""

    def check(self) -> None:
        """Raise `InvalidInputError` where the seed is out of range, or `out` is not a new .npy file."""
        at_least(self, seed=0)
        if self.out is not None and (self.out.exists() or self.out.suffix != ".npy"):
            raise InvalidInputError(f"--out {self.out} must name a new .npy file")
