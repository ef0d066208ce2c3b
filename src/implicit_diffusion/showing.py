"""The `repr` of objects: sizes, rates and progress in one line, never the numbers of a tensor or an address.

A class lists its contents in `_words`, and `Shown` puts its name in front. By default these are its fields or its
public attributes, each shortened by `brief`: a tensor to its shape and dtype, a function to its name, a network to its
class and the number of its parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = __name__.partition(".")[0]
LONGEST = 60  # characters of a string
MOST = 4  # entries of a container


class Shown:
    """A class whose `repr` is its name and its `_words`."""

    def _words(self) -> Iterable[str]:
        """The parts of the `repr`, the most important first."""
        return attributes(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._words())})"


class ShownModule(Shown, nn.Module):
    """A network of this package; its `repr` leaves out the layers, which may be hundreds of lines."""


def attributes(value: Any) -> Iterator[str]:
    """The fields of a dataclass or named tuple, the public attributes of others; without those that are None or False.

    Fields with `repr=False` are left out, and those that are missing because the constructor raised an error.
    """
    names = vars(value) if hasattr(value, "__dict__") else value._fields
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.repr]
    held = ((name, getattr(value, name, None)) for name in names if not name.startswith("_"))
    return (f"{name}={brief(item)}" for name, item in held if item is not None and item is not False)


def of_tuple(value: Any) -> str:
    """The `repr` of a named tuple."""
    return f"{type(value).__name__}({', '.join(attributes(value))})"


def brief(value: object) -> str:
    """Any value in a few words."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    ours = type(value).__module__.partition(".")[0] == PACKAGE or isinstance(value, Shown)
    if ours and type(value).__repr__ not in (object.__repr__, nn.Module.__repr__):
        return repr(value)
    if isinstance(value, nn.Module):
        return of_network(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, bool | int | complex | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST else value[:LONGEST] + "…")
    if isinstance(value, Mapping):
        return f"{{{_few(f'{brief(key)}: {brief(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        return f"({_few(map(brief, value))}{',' * (len(value) == 1)})"
    return of_function(value) if callable(value) else type(value).__name__


def of_tensor(value: Tensor) -> str:
    """A single number in full; otherwise the shape, the dtype and, unless it is the CPU, the device."""
    if value.ndim == 0 and not value.is_meta:
        try:
            return f"{value.item():.4g}"
        except RuntimeError:  # a traced tensor has no value
            pass
    return f"{tuple(value.shape)} {of_kind(value.dtype, value.device)}"


def of_kind(dtype: torch.dtype, device: torch.device) -> str:
    """The dtype and, unless it is the CPU, the device."""
    return str(dtype).removeprefix("torch.") + (f" on {device}" if device.type != "cpu" else "")


def of_network(module: nn.Module) -> str:
    """Its class and the number of its parameters; if some are frozen, also the number of those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters() if not nn.parameter.is_lazy(p)]
    total, trained = sum(n for n, _ in sizes), sum(n for n, needs in sizes if needs)
    some = f", {trained:,} trained" if 0 < trained < total else ""
    return f"{type(module).__name__} of {total:,} parameters{some}" if total else type(module).__name__


def of_function(function: Any) -> str:
    """The name of a function; for other callables, of their class."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__name__)).rpartition("<locals>.")[2]


def named(function: Callable[..., Any], name: str) -> Any:
    """Set the name of a function to that of the call that made it."""
    function.__name__ = function.__qualname__ = name
    return function


def mean_with_error(values: Tensor) -> str:
    """Mean ± standard error over the first dimension, whose entries are independent."""
    rows = values.detach().reshape(len(values), -1).double().mean(1)
    error = (rows.std() / math.sqrt(len(rows))).item() if len(rows) > 1 else math.nan
    return with_error(rows.mean().item(), error)


def with_error(mean: float, error: float) -> str:
    """The mean to the first digit of its error; without an error, to four digits."""
    if not (math.isfinite(mean) and 0 < error < math.inf):
        return f"{mean:.4g}"
    places = -int(f"{error:.0e}".partition("e")[2])
    if not -6 < places < 10:
        return f"{mean:.4g} ± {error:.1g}"
    return f"{mean:z.{max(places, 0)}f} ± {error:.{max(places, 0)}f}"


def _few(words: Iterable[str]) -> str:
    listed = list(words)
    return ", ".join(listed[:MOST]) + f", … {len(listed)} in all" * (len(listed) > MOST)
