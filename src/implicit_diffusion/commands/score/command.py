"""Log-likelihoods of data under a trained energy-based model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from implicit_diffusion.commands.ebm.data import read_array
from implicit_diffusion.commands.shared.ranges import at_least
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.models.energy_model import load_energy_model
from implicit_diffusion.noise import Noise


@dataclass(frozen=True)
class Config:
    """Compute log-likelihoods of data under a trained energy-based model."""

    model: Path
    """The model/ folder of an `implicit-diffusion ebm` run."""
    data: str
    """FILE.npy, FILE.npz, FILE.csv or FILE.safetensors with the model's event shape, in the units of its training data.
    A model of dequantised data takes discrete ones, and dequantises them itself."""
    out: Path | None = None
    """Write one log-likelihood per datum, in nats, to this new .npy file."""
    seed: int = 0
    """Seed of the noise that dequantises; other models draw none."""


def run(config: Config) -> dict[str, Any]:
    """Print the mean log-likelihood, and return it with its standard errors.

    Raises:
        InvalidInputError: no such model or data, another event shape, data without a finite log-likelihood, or an
            existing `out`.
    """
    at_least(config, seed=0)
    if config.out is not None and (config.out.exists() or config.out.suffix != ".npy"):
        raise InvalidInputError(f"--out {config.out} must name a new .npy file")
    model = load_energy_model(config.model)
    scores = model.log_likelihood(read_array(config.data), Noise(config.seed))
    error = scores.std().item() / math.sqrt(len(scores)) if len(scores) > 1 else None
    dimension = math.prod(model.architecture.event_shape)
    found = {
        "log_likelihood": scores.mean().item(),
        "standard_error": error,
        "log_z_standard_error": model.log_z_se,
        "bits_per_dimension": -scores.mean().item() / dimension / math.log(2),
        "data": len(scores),
    }
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(config.out) as file, file.open("wb") as stream:
            np.save(stream, scores.numpy(), allow_pickle=False)
    shown = "" if error is None else f" ± {error:.4f} (data)"
    shown += " ± unknown (log Z)" if model.log_z_se is None else f" ± {model.log_z_se:.4f} (log Z)"
    bound = "" if model.lattice is None else ", at least: a bound, from a draw of noise between discrete values"
    print(f"log-likelihood {found['log_likelihood']:.4f}{shown} nats per datum{bound}")
    print(f"bits per dimension {found['bits_per_dimension']:.4f}")
    return found
