"""Embeddings of prompts, one row each: beside the network where they are few, otherwise in a file on the host.

    prompts                a cat   red dog   a cat   ∅
    row of each                0         1       0   2
    columns, rows                0 .. 2     in memory and on the device, or mapped from a file

A prompt that occurs several times has one row. A table of up to `IN_MEMORY` bytes is copied to the device that first
asks for rows, and stays there, so that no call waits for a transfer. A larger one is a temporary file: the system keeps
of it what fits, reads a batch's rows when they are asked for, and they travel to the device with every call.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_tensor, check_type
from implicit_diffusion.showing import Shown, brief

IN_MEMORY = 2**28  # bytes; a larger table is a file, and is not kept on a device


class EmbeddingTable(Mapping[str, Tensor], Shown):
    """Columns by name, in which several prompts may share a row. It is a mapping: table[name] has one row per prompt.

    Args:
        columns: by name, with one row per distinct prompt, on any device.
        rows: row of each of the m prompts, with shape (m,); None where each has its own.

    Raises:
        InvalidInputError: no columns, columns of different lengths, or a row that there is not.
    """

    def __init__(self, columns: Mapping[str, Float[Tensor, "r ..."]], rows: Int[Tensor, " m"] | None = None) -> None:
        check_type("table", columns, Mapping, "it maps names to columns")
        for name, column in columns.items():
            check_tensor(f"column {name}", column, "m ...")
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidInputError(f"table must have columns of one length, one row per prompt, got {lengths}")
        (length,) = set(lengths.values())
        if rows is not None:
            check_tensor("rows", rows, "m", integers=True)
            if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= length):
                raise InvalidInputError(f"rows must lie in 0..{length - 1}, those of the columns")
        self.columns, self.rows = dict(columns), rows
        self._copies: dict[torch.device, tuple[dict[str, Tensor], Tensor | None]] = {}

    def _words(self) -> Iterable[str]:
        yield brief(self.columns)
        if self.rows is not None:
            yield f"prompts={len(self.rows)}"

    def __getitem__(self, name: str) -> Float[Tensor, "m ..."]:
        column = self.columns[name]
        return column if self.rows is None else column[self.rows.to(column.device)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingTable:
        return self  # copies of a module share it

    def of(self, which: Int[Tensor, " batch"], like: Shaped[Tensor, "..."]) -> dict[str, Float[Tensor, "batch ..."]]:
        """The embeddings of prompts by their numbers, on the device and in the dtype of `like`."""
        columns, rows = self._at(like.device)
        which = which.to(next(iter(columns.values())).device)
        which = which if rows is None else rows[which]
        return {name: column[which].to(like.device, like.dtype) for name, column in columns.items()}

    @property
    def kept(self) -> int:
        """Bytes that stay on the device of the network."""
        total = sum(column.nbytes for column in self.columns.values())
        return total if fits(total) else 0

    def _at(self, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
        """Columns and rows: copies on `device`, which stay there, where the table is small."""
        if not self.kept:
            return self.columns, self.rows
        if device not in self._copies:
            columns = {name: column.to(device) for name, column in self.columns.items()}
            self._copies[device] = columns, None if self.rows is None else self.rows.to(device)
        return self._copies[device]


class EmbeddingWriter:
    """Columns that are filled batch by batch, in memory or in a temporary file that is removed with them.

    Args:
        shapes: of each column, by name, its number of rows first.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        mapped = not fits(4 * sum(map(math.prod, shapes.values())))
        self.columns = {name: zeros(shape, torch.float32, mapped=mapped) for name, shape in shapes.items()}

    def add(self, first: int, values: Mapping[str, Float[Tensor, "batch ..."]]) -> None:
        """Add to the rows from `first` on."""
        for name, value in values.items():
            self.columns[name][first : first + len(value)] += value.to("cpu", torch.float32)


def fits(count: int) -> bool:
    """Whether a table of so many bytes is held in memory."""
    return count <= IN_MEMORY


def zeros(shape: tuple[int, ...], dtype: torch.dtype, *, mapped: bool) -> Tensor:
    """Zeros on the host; where `mapped`, in a temporary file, which has no name and vanishes with them or the process.

    It is in the folder for temporary files, the environment's TMPDIR.
    """
    count = math.prod(shape) * dtype.itemsize
    if not mapped or not count:
        return torch.zeros(shape, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(count,))).view(dtype).view(shape)
