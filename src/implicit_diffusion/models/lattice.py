"""Data on a lattice: integers, rounded measurements, grey levels. Such numbers have no density.

The density of a model can grow without limit at the values that occur, so its likelihoods mean nothing. Uniform noise
as wide as the spacing fills the gaps ("uniform dequantisation"). The density q of the sum bounds the probability P of
the values from below (Theis, van den Oord & Bethge, arXiv 1511.01844), by Jensen's inequality: with u uniform on
[0, 1)^d

    log P(x) = log ∫ q(x + s u) s^d du ≥ E_u log q(x + s u) + d log s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.showing import Shown

LEVELS = 2**16  # a lattice of more counts as a continuum: single precision has 2^24 numbers itself
FEW_LEVELS = 256  # levels that count as a lattice even if hardly a value occurs twice
LOOKED_AT = 2**17  # values of a column from which its spacing is computed
ROUNDED = 1e-9  # of the spacing, by which a value in double precision may lie below the lattice
OFF = 0.01  # of the spacing, that a value may lie off the lattice: more than single precision rounds


@dataclass(frozen=True, repr=False)
class Lattice(Shown):
    """Values offset + spacing·{0, 1, 2, …}, separately in every coordinate.

    Args:
        spacing: with the shape of an event or broadcastable to it; zero where a coordinate is continuous.
        offset: with the shape of an event or broadcastable to it.
    """

    spacing: Tensor
    offset: Tensor

    def dequantise(self, x: Float[Tensor, "n *event"], generator: torch.Generator) -> Float[Tensor, "n *event"]:
        """Uniform numbers on [x, x + spacing).

        Raises:
            InvalidInputError: x is not on the lattice; the message names a row.
        """
        steps = self._steps(x)
        off = ((steps - steps.round()).abs() > OFF).flatten(1)
        if off.any():
            row, place = off.nonzero()[0].tolist()
            step, start = (t.expand(x.shape[1:]).flatten()[place].item() for t in (self.spacing, self.offset))
            raise InvalidInputError(
                f"row {row} of the data holds {x[row].flatten()[place].item():.8g}, which is not {start:.8g} plus a "
                f"multiple of {step:.8g}, as in the data that the model was trained on; give values as these were, "
                "without noise"
            )
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        spacing = self.spacing.to(x.dtype)
        above = torch.nextafter(x + spacing, x)  # the sum may round up to the next value
        return torch.minimum(x + spacing * u, above).where(spacing > 0, x)

    def quantise(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, "n *event"]:
        """The values that `dequantise` would turn into x: x rounded down, where a coordinate is on a lattice."""
        return (self.offset + self.spacing * (self._steps(x) + ROUNDED).floor()).to(x.dtype).where(self.spacing > 0, x)

    def log_volume(self, event: tuple[int, ...]) -> float:
        """Log of a cell of the lattice: of the product of all spacings that are not zero."""
        spacing = self.spacing.double().expand(event)
        return spacing[spacing > 0].log().sum().item()

    def _steps(self, x: Tensor) -> Tensor:
        """How many spacings above the offset, in double precision; zero where a coordinate is continuous."""
        steps = (x.double() - self.offset.double()) / self.spacing.double()
        return steps.where(self.spacing > 0, 0.0)


def find_lattice(x: Float[Tensor, "m *event"]) -> Lattice | None:
    """The lattice of data, column by column, or for images one lattice for all pixels; None if all are continuous.

    A column counts as discrete if it has at most 256 levels, or if at least half of its values occurred before.
    """
    columns = x.unbind(1) if x.ndim == 2 else [x.flatten()]
    spacings = [_spacing(column) for column in columns]
    if not any(spacings):
        return None
    lowest = torch.stack([column.amin() for column in columns]).double()
    spacing = torch.tensor(spacings, dtype=torch.float64)
    if x.ndim > 2:
        spacing, lowest = spacing.view(1, 1, 1), lowest.view(1, 1, 1)
    return Lattice(spacing, lowest)


def _spacing(column: Float[Tensor, " m"]) -> float:
    """The largest number of which all differences are multiples, within rounding; 0 without a lattice."""
    some = column[:: -(-len(column) // LOOKED_AT)].double()
    values = some.unique()
    span = (values[-1] - values[0]).item()
    finest = span / LEVELS
    spacing = span
    for gap in values.diff().tolist():
        spacing = _divisor(spacing, gap, finest / 8)
        if spacing < finest:
            return 0.0
    levels = round(span / spacing)
    if levels >= FEW_LEVELS and 2 * len(values) > len(some):
        return 0.0
    spacing = span / levels  # without the rounding of single gaps
    steps = (column.double() - values[0]) / spacing
    return spacing if ((steps - steps.round()).abs() <= OFF).all() else 0.0


def _divisor(a: float, b: float, rounding: float) -> float:
    """Euclid's greatest common divisor of two lengths that are known up to `rounding`."""
    while b > rounding:
        a, b = b, abs(a - b * round(a / b))
    return a
