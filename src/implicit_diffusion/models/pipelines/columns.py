"""What a network is called with for many prompts: filled chunk by chunk, on the host or in temporary files.

An argument with one entry per prompt and part has a column per part: a tensor (m, …), or, where the pipeline gives a
list, a list of m entries, whose tensors may have different shapes. Columns that do not fit into memory are mapped from
files (`embedding_table.zeros`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from implicit_diffusion.denoisers.embedding_table import fits, zeros
from implicit_diffusion.models.pipelines.arguments import Constant, PerSample, leaves, len_of, same
from implicit_diffusion.models.pipelines.recording import NetworkCall

BLOCK = 64  # rows that are compared together


class Uneven(Exception):  # noqa: N818 - the chunks are then joined
    """Chunks do not fit together: entries of other shapes, or something else that depends on the prompts."""


class Entangled(Exception):  # noqa: N818 - the encoders are then called together
    """Numbers depend on several encoders."""


class Columns:
    """The values of the arguments of every call for `count` texts, filled from the first text to the last one.

    Then they may be filled again, from the first text on.

    Args:
        roles: of the arguments of every call.
        count: texts.
    """

    def __init__(self, roles: Sequence[Any], count: int) -> None:
        self.count = count
        self._roles = roles
        self._constants: list[Any] | None = None
        self._columns: list[Any] = []
        self._mapped, self._first = False, 0

    def entries(self, calls: Sequence[NetworkCall], texts: int, count: int) -> list[Any]:
        """Those of the first `count` texts in a run of `texts`, by columns.

        Raises:
            Uneven: an argument without an entry per text, or a constant with another value than in the first run.
        """
        entries, constants = [], []
        for roles, call in zip(self._roles, calls, strict=True):
            for name, role, value in by_role(roles, call.arguments):
                if isinstance(role, Constant):
                    constants.append(value)
                elif isinstance(role, PerSample):
                    if len_of(value) != role.parts * texts:
                        raise Uneven(f"the network's argument {name} has {len_of(value)} entries for {texts} prompts")
                    entries += [value[i * texts : i * texts + count] for i in range(role.parts)]
        if self._constants is None:
            self._constants = constants
        elif not same(constants, self._constants):
            raise Uneven("arguments of the network depend on the prompts, but not by one entry per prompt")
        return entries

    def held(self, count: int) -> list[Any]:
        """The entries of the next `count` texts, from the last time that they were filled."""
        return [column[self._first : self._first + count] for column in self._columns]

    def add(self, entries: Sequence[Any], count: int) -> None:
        """Set the entries of the next `count` texts.

        Raises:
            Uneven: other shapes than those before.
        """
        if not self._columns:
            size = sum(value.nbytes for value in tree_leaves(entries) if isinstance(value, Tensor))
            self._mapped = not fits(size * self.count // count)
            self._columns = [self._column(each) for each in entries]
        rows = slice(self._first, self._first + count)
        for column, new in zip(self._columns, entries, strict=True):
            if not isinstance(column, Tensor):
                column[rows] = self._packed(new)
                continue
            if not isinstance(new, Tensor) or (new.shape[1:], new.dtype) != (column.shape[1:], column.dtype):
                raise Uneven("embeddings of prompts that are encoded apart from each other differ in shape")
            column[rows] = new
        self._first = (self._first + count) % self.count

    def bound(self) -> list[Any]:
        """The roles with all values; of entries that are equal for all texts, one is kept."""
        constants, columns = iter(self._constants or ()), iter(self._columns)
        return [rebuilt(roles, (_bound(role, constants, columns) for role in leaves(roles))) for roles in self._roles]

    def _column(self, entries: Any) -> Any:
        if isinstance(entries, Tensor):
            return zeros((self.count, *entries.shape[1:]), entries.dtype, mapped=self._mapped)
        return [None] * self.count

    def _packed(self, entries: list[Any]) -> list[Any]:
        """Entries of a list, whose tensors of a kind are views of one on the host."""
        tensors = [value for value in tree_leaves(entries) if isinstance(value, Tensor)]
        packs = {
            dtype: iter(_copies([value for value in tensors if value.dtype == dtype], mapped=self._mapped))
            for dtype in {value.dtype for value in tensors}
        }
        packed: list[Any] = tree_map_only(Tensor, lambda value: next(packs[value.dtype]), entries)
        return packed


def _copies(tensors: list[Tensor], *, mapped: bool) -> Iterator[Tensor]:
    pack = zeros((sum(value.numel() for value in tensors),), tensors[0].dtype, mapped=mapped)
    parts = pack.split([value.numel() for value in tensors])
    return (part.copy_(value.flatten()).view(value.shape) for part, value in zip(parts, tensors, strict=True))


def _bound(role: Any, constants: Iterator[Any], columns: Iterator[Any]) -> Any:
    if isinstance(role, Constant):
        return Constant(next(constants))
    if isinstance(role, PerSample):
        return PerSample(role.parts, tuple(_deduplicated(next(columns)) for _ in range(role.parts)))
    return role


def _deduplicated(column: Any) -> Any:
    """One row in place of many that are equal, as those of one negative prompt are."""
    equal = isinstance(column, Tensor) and all(bool((block == column[:1]).all()) for block in column.split(BLOCK))
    return column[:1].clone() if equal else column


def merged(old: Sequence[Any], silent: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """The entries `new` where they differ from `silent`, otherwise `old`.

    Raises:
        Entangled: they differ in more than numbers.
    """
    return [_merged(*each) for each in zip(old, silent, new, strict=True)]


def _merged(old: Any, silent: Any, new: Any) -> Any:
    if isinstance(new, Tensor):
        if not isinstance(silent, Tensor) or silent.shape != new.shape or old.shape != new.shape:
            raise Entangled
        return torch.where((new == silent).cpu(), old, new.cpu())
    if isinstance(new, list) and len(silent) == len(new):
        return merged(old, silent, new)
    if not same(new, silent):
        raise Entangled
    return old


def by_role(roles: Any, values: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The roles with their values and the names of those.

    Raises:
        Uneven: values that are nested in another way.
    """
    if isinstance(roles, Mapping):
        if not isinstance(values, Mapping) or values.keys() != roles.keys():
            raise Uneven(f"the network's argument {name} depends on the prompts")
        for key, role in roles.items():
            yield from by_role(role, values[key], f"{name}[{key!r}]" if name else str(key))
    elif isinstance(roles, list | tuple):
        if not isinstance(values, list | tuple) or len(values) != len(roles):
            raise Uneven(f"the network's argument {name} depends on the prompts")
        for i, (role, value) in enumerate(zip(roles, values, strict=True)):
            yield from by_role(role, value, f"{name}[{i}]")
    else:
        yield name, roles, values


def rebuilt(roles: Any, others: Iterator[Any]) -> Any:
    """The same nesting of other roles, in the order of `by_role`."""
    if isinstance(roles, Mapping):
        return {key: rebuilt(role, others) for key, role in roles.items()}
    if isinstance(roles, list | tuple):
        return type(roles)([rebuilt(role, others) for role in roles])
    return next(others)
