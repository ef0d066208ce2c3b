"""What an energy-based model is trained on: laws of the plane, the handwritten digits, or an array of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments.planar import LAWS, Law, law
from implicit_diffusion.noise import Noise

TRAIN, HELD_OUT = range(2)  # streams of noise
SIZES = 20_000, 10_000  # of laws
SHARE = 0.2  # of an array that is held out
GREY_LEVELS = 17  # of the handwritten digits
COPIES = 20  # of each, with noise of their own: a network could learn a single draw by heart


@dataclass(frozen=True)
class Data:
    """Data in their own units.

    Args:
        train, held_out: with shape (m, *event).
        shift, scale: mean and deviation of every coordinate of the training data, with the shape of an event; pixels
            that (nearly) never change get a hundredth of the largest deviation.
        law: where the data come from, if that is known.
        digits: whether they are the handwritten digits, which have a judge.
    """

    train: Float[Tensor, "m *event"]
    held_out: Float[Tensor, "l *event"]
    shift: Tensor
    scale: Tensor
    law: Law | None = None
    digits: bool = False

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of one datum."""
        return tuple(self.train.shape[1:])

    def standardised(self) -> tuple[Float[Tensor, "m *event"], Float[Tensor, "l *event"]]:
        """Training and held-out data in the model's coordinates."""
        train, held_out = ((x - self.shift) / self.scale for x in (self.train, self.held_out))
        return train, held_out


def load(name: str, noise: Noise) -> Data:
    """The data called `name`: one of the laws, "digits", or a file FILE.npy.

    Raises:
        InvalidInputError: an unknown name, or a file that is no array of finite numbers with shape (m, d) or
            (m, channels, height, width), m ≥ 10, without a constant column.
    """
    if name in LAWS:
        target = law(name)
        train, held_out = (target.sample(n, noise.stream(key)) for key, n in zip((TRAIN, HELD_OUT), SIZES))
        return Data(train, held_out, train.mean(0), train.std(0), target)
    if name == "digits":
        from implicit_diffusion.experiments.digits import load_digits

        digits = load_digits()
        train = dequantised(((digits.train + 1) * 8).repeat(COPIES, 1, 1, 1), noise.generator(TRAIN))
        held_out = dequantised((digits.held_out + 1) * 8, noise.generator(HELD_OUT))
    else:
        train, held_out = split(read_array(name), noise)
    scale = train.std(0)
    scale = scale.clamp(min=0.01 * scale.amax().item()) if train.ndim > 2 else scale
    return Data(train, held_out, train.mean(0), scale, digits=name == "digits")


def dequantised(levels: Float[Tensor, "n *event"], generator: torch.Generator) -> Float[Tensor, "n *event"]:
    """Integers plus uniform numbers: a density of these bounds the probability of those (Theis et al., 1511.01844)."""
    return levels.round() + torch.rand(levels.shape, generator=generator)


def read_array(name: str) -> Float[Tensor, "m *event"]:
    """An array of data from a .npy file; errors as in `load`."""
    path = Path(name)
    if not path.is_file():
        raise InvalidInputError(f"--data {name}: no such file; give one of {', '.join(LAWS)}, digits, or FILE.npy")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise InvalidInputError(f"--data {name} is no plain .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise InvalidInputError(f"--data {name} must hold one array of numbers, got {getattr(array, 'dtype', array)}")
    if array.ndim not in (2, 4):
        raise InvalidInputError(
            f"--data {name} must have shape (m, d) or (m, channels, height, width), got {array.shape}"
        )
    if array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        raise InvalidInputError(
            f"--data {name} has shape {array.shape}, which looks like (m, height, width, channels); channels come "
            "second: save array.transpose(0, 3, 1, 2)"
        )
    if array.size == 0:
        raise InvalidInputError(f"--data {name} holds no data, got shape {array.shape}")
    with np.errstate(over="ignore"):  # what single precision cannot hold is infinite, and refused
        x = torch.from_numpy(array.astype(np.float32))
    bad = int((~x.flatten(1).isfinite().all(1)).sum())
    if bad:
        raise InvalidInputError(f"--data {name}: {bad} of {len(x)} rows hold NaN or infinity; remove or impute them")
    return x


def split(x: Float[Tensor, "m *event"], noise: Noise) -> tuple[Tensor, Tensor]:
    """A fifth held out, at random. Errors as in `load`."""
    if len(x) < 10:
        raise InvalidInputError(f"--data needs at least 10 rows, of which a fifth is held out, got {len(x)}")
    order = torch.randperm(len(x), generator=noise.generator(TRAIN))
    held = round(SHARE * len(x))
    train, held_out = x[order[held:]], x[order[:held]]
    if x.ndim == 2:
        constant = (train.std(0) <= 1e-6 * train.abs().amax(0)).nonzero().flatten().tolist()
        if constant:
            raise InvalidInputError(
                f"--data: columns {constant} are constant, and a density of them is none; leave these columns out"
            )
    elif train.std() == 0:
        raise InvalidInputError("--data: all pixels are the same")
    return train, held_out
