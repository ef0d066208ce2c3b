"""What an energy-based model is trained on: laws of the plane, the handwritten digits, or an array of one's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit_diffusion.commands.shared.arrays.array_files import read_array_file
from implicit_diffusion.commands.shared.arrays.data_arrays import to_tensor
from implicit_diffusion.commands.shared.arrays.idx import PACKAGES
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.lattice import LEVELS, Lattice, find_lattice
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials.plane import LAWS, Law, law
from implicit_diffusion.showing import Shown

TRAIN, HELD_OUT, FILLED = 0, 1, 6  # streams of noise beside those of training
SIZES = 20_000, 10_000  # of laws
SHARE = 0.2  # of an array that is held out
GREY_LEVELS = 17  # of the handwritten digits
MOST_NAMED = 10  # columns in a message
COPIES = 20  # of dequantised data, with noise of their own: a network could memorise a single draw
MOST_COPIED = 2**23  # numbers in all copies, at most
GREY = Lattice(torch.ones(()), torch.zeros(()))  # of the digits


@dataclass(frozen=True, repr=False)
class Data(Shown):
    """Data in their own units, in single precision, or in double where single would round them.

    Args:
        train, held_out: with shape (m, *event).
        shift, scale: mean and deviation of every coordinate of the training data, with the shape of an event; pixels
            that (nearly) never change get a hundredth of the largest deviation.
        law: that the data come from; None where it is not known.
        digits: whether they are the handwritten digits, which a classifier can judge.
        columns: what the coordinates are called, where the file says so.
        lattice: that the data lay on before they were dequantised, or lie on because they were not.
        dequantised: whether they were.
        copies: of the training data, one after the other, each with noise of its own.
    """

    train: Float[Tensor, "m *event"]
    held_out: Float[Tensor, "l *event"]
    shift: Tensor
    scale: Tensor
    law: Law | None = None
    digits: bool = False
    columns: tuple[str, ...] | None = None
    lattice: Lattice | None = None
    dequantised: bool = False
    copies: int = 1

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of one datum."""
        return tuple(self.train.shape[1:])

    @property
    def names(self) -> tuple[str, ...]:
        """What the coordinates are called; x₁, x₂, … where the file has no names."""
        return self.columns or tuple(f"$x_{{{i + 1}}}$" for i in range(math.prod(self.event_shape)))

    @property
    def once(self) -> Float[Tensor, "k *event"]:
        """One copy of the training data."""
        return self.train[: len(self.train) // self.copies]

    @property
    def log_cell(self) -> float:
        """What turns a log-density of dequantised data into a lower bound of a log-probability; zero for other data."""
        return self.lattice.log_volume(self.event_shape) if self.dequantised and self.lattice is not None else 0.0

    def standardised(self) -> tuple[Float[Tensor, "m *event"], Float[Tensor, "l *event"]]:
        """Training and held-out data in the model's coordinates, in single precision."""
        train, held_out = (((x - self.shift) / self.scale).float() for x in (self.train, self.held_out))
        return train, held_out


def load_data(name: str, noise: Noise, *, dequantise: bool = False) -> Data:
    """The data called `name`: one of the laws, "digits", one of `idx.PACKAGES`, or a file of `array_files.FORMATS`.

    Args:
        name: see above.
        noise: of draws, of the split, and of dequantisation.
        dequantise: add uniform noise as wide as the spacing of the values; to digits and to the images of a package it
            is added in any case.

    Raises:
        InvalidInputError: an unknown name; a file without an array of finite numbers with shape (m, d) or
            (m, channels, height, width), m ≥ 10, without a constant column; nothing to dequantise.
        MemoryLimitError: an array that does not fit into the memory that is free.
    """
    if name in LAWS:
        target = law(name)
        train, held_out = (target.sample(n, noise.stream(key)) for key, n in zip((TRAIN, HELD_OUT), SIZES))
        return Data(train, held_out, *moments(train), target)
    columns, copies = None, 1
    if name == "digits":
        from implicit_diffusion.digits import load_digits

        digits = load_digits()
        train, held_out = (((x + 1) * 8).round() for x in (digits.train, digits.held_out))
        lattice: Lattice | None = GREY
    else:
        table = read_array_file(name, f"one of {', '.join(LAWS)}, digits, {', '.join(PACKAGES)}, ")
        columns = table.columns
        x = to_tensor(name, table.array)
        train, held_out = split(x, noise, columns)
        lattice = find_lattice(x)
        if dequantise and lattice is None:
            raise InvalidInputError(
                f"--dequantise has no effect: the values of --data {name} lie on no lattice of at most "
                f"{LEVELS} steps, so they have a density as they are; leave it out"
            )
    dequantise = dequantise or name in ("digits", *PACKAGES)
    if dequantise and lattice is not None:
        copies = COPIES if name == "digits" else max(1, min(COPIES, MOST_COPIED // train.numel()))
        repeated = train.repeat(copies, *[1] * (train.ndim - 1))
        train = lattice.dequantise(repeated, noise.generator(TRAIN if name == "digits" else FILLED))
        held_out = lattice.dequantise(held_out, noise.generator(HELD_OUT))
    shift, scale = moments(train)
    scale = scale.clamp(min=0.01 * scale.amax().item()) if train.ndim > 2 else scale
    return Data(train, held_out, shift, scale, None, name == "digits", columns, lattice, dequantise, copies)


def discrete(data: Data) -> str | None:
    """A warning about data that lie on a lattice and are not dequantised; None for other data."""
    if data.lattice is None or data.dequantised:
        return None
    spacing = data.lattice.spacing
    if len(data.event_shape) == 3:
        where = f"all pixels are multiples of {spacing.item():.4g}"
    else:
        of = [i for i, s in enumerate(spacing.tolist()) if s]
        names = ", ".join(column_name(data.names[i]) for i in of[:MOST_NAMED])
        steps = sorted({f"{spacing[i]:.4g}" for i in of}, key=float)
        where = (
            f"columns {names}{', …' if len(of) > MOST_NAMED else ''} hold multiples of {', '.join(steps[:MOST_NAMED])}"
        )
    return (
        f"{where}: a density may pile up on such values without limit, so its likelihood means little. --dequantise "
        "fills the gaps with noise, and bounds the probability of the values"
    )


def column_name(name: str) -> str:
    """A column's name without the formula of `Data.names`: x1, where the file has no names."""
    return name.replace("$x_{", "x").replace("}$", "") if name.startswith("$x_{") else name


def moments(x: Float[Tensor, "m *event"]) -> tuple[Float[Tensor, "*event"], Float[Tensor, "*event"]]:
    """Mean and deviation of every coordinate, summed in double precision, in that of the data."""
    exact = x.double()
    return exact.mean(0).to(x.dtype), exact.std(0).to(x.dtype)


def split(x: Float[Tensor, "m *event"], noise: Noise, columns: tuple[str, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Training and held-out data; a fifth is held out, at random.

    Args:
        x: all data.
        noise: of the choice.
        columns: names for the messages, where there are some.

    Raises:
        InvalidInputError: fewer than ten data, a constant column, or images of a single value.
    """
    if len(x) < 10:
        raise InvalidInputError(f"--data needs at least 10 rows, of which a fifth is held out, got {len(x)}")
    order = torch.randperm(len(x), generator=noise.generator(TRAIN))
    count = round(SHARE * len(x))
    train, held_out = x[order[count:]], x[order[:count]]
    if x.ndim == 2:
        constant = _constant(train).nonzero().flatten().tolist()
        if constant:
            which = ", ".join(columns[i] for i in constant) if columns else constant
            raise InvalidInputError(
                f"--data: columns {which} are constant, and so have no density; leave these columns out"
            )
    elif _constant(train.flatten()):
        raise InvalidInputError("--data: all pixels are the same")
    return train, held_out


def _constant(x: Float[Tensor, "m *event"]) -> Bool[Tensor, "*event"]:
    """Where numbers vary by no more than their rounding."""
    return moments(x)[1] <= 8 * torch.finfo(x.dtype).eps * x.abs().amax(0)
