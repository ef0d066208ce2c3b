"""What an energy-based model is trained on: laws of the plane, the handwritten digits, or an array of one's own."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.experiments.planar import LAWS, Law, law
from implicit_diffusion.noise import Noise

TRAIN, HELD_OUT = range(2)  # streams of noise
SIZES = 20_000, 10_000  # of laws
SHARE = 0.2  # of an array that is held out
GREY_LEVELS = 17  # of the handwritten digits
SHOWN = 10  # rows that are named
COPIES = 20  # of each, with noise of their own: a network could learn a single draw by heart


@dataclass(frozen=True)
class Data:
    """Data in their own units, in single precision, or in double where single would round them.

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
        """Training and held-out data in the model's coordinates, in single precision."""
        train, held_out = (((x - self.shift) / self.scale).float() for x in (self.train, self.held_out))
        return train, held_out


def load(name: str, noise: Noise) -> Data:
    """The data called `name`: one of the laws, "digits", or a file FILE.npy.

    Raises:
        InvalidInputError: an unknown name, or a file that is no array of finite numbers with shape (m, d) or
            (m, channels, height, width), m ≥ 10, without a constant column.
        MemoryLimitError: an array that does not fit into the memory that is free.
    """
    if name in LAWS:
        target = law(name)
        train, held_out = (target.sample(n, noise.stream(key)) for key, n in zip((TRAIN, HELD_OUT), SIZES))
        return Data(train, held_out, *moments(train), target)
    if name == "digits":
        from implicit_diffusion.experiments.digits import load_digits

        digits = load_digits()
        train = dequantised(((digits.train + 1) * 8).repeat(COPIES, 1, 1, 1), noise.generator(TRAIN))
        held_out = dequantised((digits.held_out + 1) * 8, noise.generator(HELD_OUT))
    else:
        train, held_out = split(read_array(name), noise)
    shift, scale = moments(train)
    scale = scale.clamp(min=0.01 * scale.amax().item()) if train.ndim > 2 else scale
    return Data(train, held_out, shift, scale, digits=name == "digits")


def moments(x: Float[Tensor, "m *event"]) -> tuple[Float[Tensor, "*event"], Float[Tensor, "*event"]]:
    """Mean and deviation of every coordinate, summed in double precision, in that of the data."""
    exact = x.double()
    return exact.mean(0).to(x.dtype), exact.std(0).to(x.dtype)


def dequantised(levels: Float[Tensor, "n *event"], generator: torch.Generator) -> Float[Tensor, "n *event"]:
    """Integers plus uniform numbers: a density of these bounds the probability of those (Theis et al., 1511.01844)."""
    return levels.round() + torch.rand(levels.shape, generator=generator)


def read_array(name: str) -> Float[Tensor, "m *event"]:
    """An array of data from a .npy file, in double precision where single would round it; errors as in `load`."""
    array = _read(name)
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
    single = np.can_cast(array.dtype, np.float32)
    x = torch.from_numpy(array.astype(np.float32 if single else np.float64, order="C"))
    if array.dtype.kind in "iu" and not single and (x.abs() > 2**53).any():
        raise InvalidInputError(
            f"--data {name} holds integers beyond 2^53, which are rounded; subtract an offset first"
        )
    bad = (~(x.flatten(1).abs() <= torch.finfo(torch.float32).max).all(1)).nonzero().flatten().tolist()  # NaN, too
    if bad:
        rows = ", ".join(map(str, bad[:SHOWN])) + (", …" if len(bad) > SHOWN else "")
        raise InvalidInputError(
            f"--data {name}: {len(bad)} of {len(x)} rows hold NaN or infinity; remove or impute them (rows {rows})"
        )
    return x


def _read(name: str) -> np.ndarray:
    """The array of numbers in a file that says honestly what it holds; nothing is allocated before that is known."""
    path = Path(name)
    if not os.path.isfile(path):  # no folder, pipe or device, whose reading might never end
        raise InvalidInputError(f"--data {name}: no such file; give one of {', '.join(LAWS)}, digits, or FILE.npy")
    if is_zipfile(path):
        raise InvalidInputError(f"--data {name} must hold one array of numbers, got an archive; save one of its arrays")
    try:
        shape, dtype, behind = _header(path)
        if dtype.kind not in "fiub" or dtype.itemsize > 8:
            raise InvalidInputError(f"--data {name} must hold one array of numbers, got {dtype}")
        promised = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or promised != behind:
            raise ValueError(f"its header says {promised} bytes of shape {shape}, and {behind} follow")
        _check_memory(name, math.prod(shape), dtype)
        return np.asarray(np.load(path, allow_pickle=False))
    except (InvalidInputError, MemoryLimitError):
        raise
    except Exception as error:  # numpy raises what it likes about a header: ValueError, EOFError, SyntaxError, ...
        raise InvalidInputError(f"--data {name} is no plain .npy array: {error}") from error


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type that a .npy file promises, and the bytes behind its header."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        # a header of version 3.0 differs from 2.0 in the names of fields alone, which no array of numbers has
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, and loading them would run code (allow_pickle is off)")
        return shape, dtype, os.fstat(file.fileno()).st_size - file.tell()


def _check_memory(name: str, numbers: int, dtype: np.dtype) -> None:
    import psutil

    kept = 4 if np.can_cast(dtype, np.float32) else 8
    needed = numbers * (dtype.itemsize + 2 * kept + 8 + 4)  # as read, as kept and split, for moments, standardised
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"--data {name}: {numbers} numbers need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; take fewer rows"
        )


def split(x: Float[Tensor, "m *event"], noise: Noise) -> tuple[Tensor, Tensor]:
    """A fifth held out, at random. Errors as in `load`."""
    if len(x) < 10:
        raise InvalidInputError(f"--data needs at least 10 rows, of which a fifth is held out, got {len(x)}")
    order = torch.randperm(len(x), generator=noise.generator(TRAIN))
    held = round(SHARE * len(x))
    train, held_out = x[order[held:]], x[order[:held]]
    if x.ndim == 2:
        constant = _constant(train).nonzero().flatten().tolist()
        if constant:
            raise InvalidInputError(
                f"--data: columns {constant} are constant, and a density of them is none; leave these columns out"
            )
    elif _constant(train.flatten()):
        raise InvalidInputError("--data: all pixels are the same")
    return train, held_out


def _constant(x: Float[Tensor, "m *event"]) -> Bool[Tensor, "*event"]:
    """Where numbers vary by no more than their rounding."""
    return moments(x)[1] <= 8 * torch.finfo(x.dtype).eps * x.abs().amax(0)
