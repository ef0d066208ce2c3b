"""Draw from a trained energy-based model: a picture, or an array of samples in the units of its data."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from implicit_diffusion.commands.sample.grid import write_array, write_plane
from implicit_diffusion.errors import InvalidInputError
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
        write_array(x, out)
    else:
        _picture(model, x, out)
    print(out)
    return out


def _picture(model: EnergyModel, x: torch.Tensor, out: Path) -> None:
    from implicit_diffusion.commands.shared.drawing import finish_figure, image_grid, sheet

    if len(model.architecture.event_shape) != 3:
        write_plane(x, out)
        return
    figure = sheet(4.2, 4.2)
    image_grid(figure.subplots(), x, x.amin().item(), x.amax().item(), columns=math.ceil(len(x) ** 0.5))
    finish_figure(figure, out)
