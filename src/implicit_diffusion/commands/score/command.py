"""Log-likelihoods of data under a trained energy-based model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from implicit_diffusion.commands.score.config import Config
from implicit_diffusion.commands.shared.arrays.data_arrays import read_array
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.models.energy_model import load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import main_only


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a set of data.

    Args:
        log_likelihood: mean over the data, in nats.
        standard_error: of that mean; None for a single datum.
        log_z_standard_error: of the model's log Z; None where it is not known.
        bits_per_dimension: the same in bits, with the sign turned.
        data: their number.
    """

    log_likelihood: float
    standard_error: float | None
    log_z_standard_error: float | None
    bits_per_dimension: float
    data: int


@main_only
def run(config: Config) -> dict[str, Any]:
    """Print the mean log-likelihood, and return the fields of `Score`; of several processes, the main one computes.

    Args:
        config: the options.

    Raises:
        InvalidInputError: no such model or data, another event shape, data without a finite log-likelihood, or an
            existing `out`.
    """
    config.check()
    model = load_energy_model(config.model)
    values = model.log_likelihood(read_array(config.data), Noise(config.seed))
    mean, dimension = values.mean().item(), math.prod(model.architecture.event_shape)
    score = Score(
        log_likelihood=mean,
        standard_error=values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None,
        log_z_standard_error=model.log_z_se,
        bits_per_dimension=-mean / dimension / math.log(2),
        data=len(values),
    )
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(config.out) as file, file.open("wb") as stream:
            np.save(stream, values.numpy(), allow_pickle=False)
    show(score, bound=model.lattice is not None)
    return asdict(score)


def show(score: Score, *, bound: bool) -> None:
    """Print it; `bound` says that it is a lower bound, of dequantised data."""
    errors = "" if score.standard_error is None else f" ± {score.standard_error:.4f} (data)"
    log_z = score.log_z_standard_error
    errors += " ± unknown (log Z)" if log_z is None else f" ± {log_z:.4f} (log Z)"
    at_least = ", at least: a bound, from a draw of noise between discrete values" if bound else ""
    print(f"log-likelihood {score.log_likelihood:.4f}{errors} nats per datum{at_least}")
    print(f"bits per dimension {score.bits_per_dimension:.4f}")
