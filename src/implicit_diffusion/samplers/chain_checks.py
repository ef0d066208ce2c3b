"""What a chain checks about its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, shown
from implicit_diffusion.tables.table import ChainTable


def check_event_shape(event_shape: Iterable[int]) -> tuple[int, ...]:
    """The sizes of one sample, as Python's integers.

    Raises:
        InvalidInputError: no sizes, or one that is not a positive integer.
    """
    check_type("event_shape", event_shape, Iterable, "it holds the sizes of one sample, e.g. (1, 8, 8) or (2,)")
    sizes = _sequence(event_shape)
    if not sizes or not all(isinstance(size, Integral) and int(size) >= 1 for size in sizes):
        raise InvalidInputError(f"event_shape must hold positive sizes, e.g. (1, 8, 8), got {shown(event_shape)}")
    return tuple(check_integer("a size in event_shape", size) for size in sizes)


def check_pretrained_rows(pretrained_rows: Iterable[int] | str, table: ChainTable) -> frozenset[int]:
    """The rows on which u_0 acts.

    Raises:
        InvalidInputError: a row that the table does not have.
    """
    if isinstance(pretrained_rows, str) and pretrained_rows == "noiseless":
        pretrained_rows = table.noiseless()
    check_type("pretrained_rows", pretrained_rows, Iterable, 'name rows by number, or use "noiseless"')
    rows = _sequence(pretrained_rows)
    if not all(isinstance(row, Integral) and 0 <= int(row) < len(table) for row in rows):
        raise InvalidInputError(f"pretrained_rows must lie in 0..{len(table) - 1}, got {shown(rows)}")
    return frozenset(map(int, rows))


def check_condition(given: object, batch: int) -> None:
    """Raise `InvalidInputError` unless a condition returned a dict of tensors with leading dimension `batch`."""
    named = given.items() if isinstance(given, Mapping) else [("condition", given)]
    for name, value in named:
        if not isinstance(given, Mapping) or not isinstance(value, Tensor) or value.shape[:1] != (batch,):
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(
                f"condition must return a dict of tensors with leading dimension batch = {batch}, one entry per "
                f"sample; {name!r} has {what}"
            )


def _sequence(given: Iterable[Any]) -> tuple[Any, ...]:
    """Numbers in a row; none for a string, or for a tensor of one number, which torch calls iterable too."""
    return () if isinstance(given, str) or getattr(given, "ndim", 1) == 0 else tuple(given)
