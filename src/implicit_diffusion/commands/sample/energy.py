"""Draw from a trained energy-based model: a picture, or an array of samples in the units of its data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.models.energy_model import EnergyModel, load_energy_model
from implicit_diffusion.noise import Noise


def sample_energy_model(folder: Path, num: int, out: Path, steps: int | None, seed: int) -> Path:
    """Write `num` samples to `out`: as an array where it ends in .npy, else as a picture of images or of the plane.

    Samples of a model of dequantised data are rounded down to values that such data have.

    Raises:
        InvalidInputError: there is no such model, or its samples have no picture.
    """
    model = load_energy_model(folder)
    event = model.architecture.event_shape
    if out.suffix != ".npy" and len(event) != 3 and event != (2,):
        raise InvalidInputError(f"--out {out}: events of shape {event} have no picture; name a file FILE.npy")
    x = model.sample(num, Noise(seed), **({} if steps is None else {"steps": steps}))
    if model.lattice is not None:
        x = model.lattice.quantise(x)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        with replacing(out) as file, file.open("wb") as stream:
            np.save(stream, x.numpy(), allow_pickle=False)
    else:
        _picture(model, x, out)
    print(out)
    return out


def _picture(model: EnergyModel, x: torch.Tensor, out: Path) -> None:
    from implicit_diffusion.commands.shared.drawing import finish_figure, image_grid, sheet

    figure = sheet(4.2, 4.2)
    axis = figure.subplots()
    if len(model.architecture.event_shape) == 3:
        image_grid(axis, x, x.amin().item(), x.amax().item(), columns=math.ceil(len(x) ** 0.5))
    else:
        axis.scatter(x[:, 0], x[:, 1], s=3, lw=0, color="#2a9d5c")
        axis.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    finish_figure(figure, out)
