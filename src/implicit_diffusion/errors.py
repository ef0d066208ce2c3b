"""Errors, and checks of arguments.

Every error is an `ImplicitDiffusionError`, and also the built-in error that is closest to it.

A message names the argument, what was given and what would work. The checks below word it in the same way for all
arguments of a type; those that convert return the converted argument.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, SupportsFloat

__all__ = [  # the public ones; the checks are for the package itself
    "DivergenceError",
    "ImplicitDiffusionError",
    "InvalidInputError",
    "MemoryLimitError",
    "MissingExtraError",
    "NoGradientError",
    "NonAffineError",
    "NonFiniteError",
    "ProcessError",
    "RewardError",
    "StorageError",
]


class ImplicitDiffusionError(Exception):
    """Base class of all errors that this package raises on purpose."""


class InvalidInputError(ImplicitDiffusionError, ValueError):
    """An argument, option, file or folder that cannot be used; raised before any long work."""


class NoGradientError(InvalidInputError):
    """A function of samples without a gradient that could be followed: a black box."""


class NonAffineError(InvalidInputError):
    """A scheduler whose step is not affine in (x, u, ξ), or has hidden state: no table can express it."""


class NonFiniteError(ImplicitDiffusionError, ArithmeticError):
    """NaN or infinity in a running computation; raised before it reaches the parameters or a file."""


class DivergenceError(ImplicitDiffusionError, ArithmeticError):
    """Training that diverges although its numbers are still finite; raised before its result replaces a good one."""


class MemoryLimitError(ImplicitDiffusionError, MemoryError):
    """The predicted memory exceeds what the device has."""


class MissingExtraError(ImplicitDiffusionError, ImportError):
    """A library that this part of the package uses is not installed; the message is the command that installs it."""


class StorageError(ImplicitDiffusionError, OSError):
    """A file that cannot be written, or a folder that cannot be locked; its previous contents are intact."""


class ProcessError(ImplicitDiffusionError, RuntimeError):
    """Another of the processes that compute a run together has ended, or does not answer any more."""


class RewardError(ImplicitDiffusionError, RuntimeError):
    """A reward function of the user that raised an error, or tried to exit, during a run."""


NOT_OF_THE_RUN = (StorageError, MemoryLimitError, RewardError, ProcessError)  # it can continue when these are mended
LARGEST_INTEGER = 2**31 - 1  # of counts and sizes


def shown(value: object) -> str:
    """A value for a message: numbers and short strings in full, tensors by dtype and shape, others by type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape):
        return f"{value.dtype} with shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)) and len(value) <= 6:
        return f"{type(value).__name__} of {', '.join(map(shown, value)) or 'nothing'}"
    short = value is None or isinstance(value, (bool, int, float, complex, str))
    if short or hasattr(value, "dtype") or type(value).__name__ in ("dtype", "device"):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}…"
    return type(value).__name__


def check_type(name: str, value: object, kind: Any, advice: str) -> None:
    """Raise `InvalidInputError` where an argument is of another type; `advice` says what to give instead."""
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise InvalidInputError(f"{name} must be of type {kind.__name__}, got {given}; {advice}")


def check_integer(name: str, value: Any, least: int = 1, most: int = LARGEST_INTEGER, *, note: str = "") -> int:
    """The argument as a Python `int`.

    Args:
        name: of the argument.
        value: an integer of any library, but not True or False.
        least: smallest allowed value.
        most: largest allowed value.
        note: added to the message after the condition.

    Raises:
        InvalidInputError: not an integer, or one out of bounds.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # tensors raise various errors
        number = None
    if number is None or not least <= number <= most:
        open_ended = most >= LARGEST_INTEGER and (number is None or number < least)
        must = f"be an integer ≥ {least}" if open_ended else f"lie in {least}..{most}"
        raise InvalidInputError(f"{name} must {must}{note}, got {shown(value)}")
    return number


def check_number(
    name: str,
    value: Any,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    closed: bool = False,
    note: str = "",
) -> float:
    """The argument, a finite real number between two bounds, as a `float`.

    Args:
        name: of the argument.
        value: a number of any library, or a tensor of one number, but not True or False.
        low: lower bound, excluded.
        high: upper bound, excluded.
        closed: whether the bounds themselves are allowed.
        note: added to the message after the condition.

    Raises:
        InvalidInputError: not a number, NaN or infinite, or out of bounds.
    """
    try:
        number = (
            math.nan if isinstance(value, (bool, str, bytes)) or not isinstance(value, SupportsFloat) else float(value)
        )
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    inside = low <= number <= high if closed else low < number < high
    if not (inside and math.isfinite(number)):
        if (low, high) == (0, math.inf):
            must = "be ≥ 0 and finite" if closed else "be positive and finite"
        elif math.isfinite(low) or math.isfinite(high):
            must = f"lie in {'[' if closed else '('}{low:g}, {high:g}{']' if closed else ')'}"
        else:
            must = "be finite"
        raise InvalidInputError(f"{name} must {must}{note}, got {shown(value)}")
    return number


def check_tensor(name: str, value: Any, shape: str, *, finite: bool = False, integers: bool = False) -> Any:
    """The argument, a dense tensor of numbers with the dimensions of `shape`.

    Args:
        name: of the argument.
        value: a tensor.
        shape: names of its dimensions, as in annotations: "n *event" are at least two, "n" is exactly one, and "n ..."
            at least one. None may have size 0.
        finite: whether NaN and infinity are refused as well.
        integers: whether it holds integers instead of floating-point numbers.

    Raises:
        InvalidInputError: any other value.
    """
    from torch import Tensor, strided

    dims, kind = shape.split(), "integers" if integers else "floating-point numbers"
    check_type(name, value, Tensor, f"use torch.as_tensor({name.split()[-1]})")
    right = not (value.is_floating_point() or value.is_complex()) if integers else value.is_floating_point()
    many, least = any(dim[0] in "*." for dim in dims), len(dims) - ("..." in dims)
    fits = value.ndim >= least if many else value.ndim == least
    if not right or not fits or (value.numel() == 0 and dims) or value.layout != strided or value.is_meta:
        where = " on the meta device" * value.is_meta + f" in the layout {value.layout}" * (value.layout != strided)
        raise InvalidInputError(
            f"{name} must be a tensor of {kind} with shape ({', '.join(dims)}), none of them 0, got "
            f"{value.dtype} with shape {tuple(value.shape)}{where}"
        )
    if finite and not value.isfinite().all():
        raise InvalidInputError(f"{name} must be finite floating-point numbers, but hold NaN or infinity")
    return value


def check_call(name: str, function: Any, *arguments: str, more: bool = False) -> None:
    """Raise `InvalidInputError` where `function` cannot be called with these positional arguments; with `more`, other
    arguments may follow by name.
    """
    form = f"{name} must be a function that is called with {' and '.join(arguments)}"
    if isinstance(function, type) or not callable(function):
        raise InvalidInputError(f"{form}, got {shown(function)}")
    try:
        signature = inspect.signature(getattr(function, "forward", function))
        (signature.bind_partial if more else signature.bind)(*arguments)
    except TypeError as error:
        raise InvalidInputError(f"{form}, got one that is not: {error}") from error
    except ValueError:  # functions written in C may have no signature
        pass


def check_path(name: str, value: object) -> Path:
    """The path of a file or folder, from a string or any path; a leading `~` is the home folder, as in a shell.

    Raises:
        InvalidInputError: neither, an empty string, or the home of a user who has none.
    """
    given = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(given, str) or not given:
        raise InvalidInputError(f"{name} must be a path, a string or a pathlib.Path, got {shown(value)}")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise InvalidInputError(f"{name}: {given!r} names a home folder that is not known") from error


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `InvalidInputError` unless a string is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidInputError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


@contextmanager
def trying(name: str, on: str) -> Iterator[None]:
    """Turn any error of a user's function or module, called here for the first time, into one line that names it.

    Args:
        name: of the argument.
        on: what it is called with.

    Raises:
        InvalidInputError: for every error except those of this package and a lack of memory.
    """
    try:
        yield
    except (ImplicitDiffusionError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            raise
        lines, frames = reason_of(error).strip().splitlines() or [""], traceback.extract_tb(error.__traceback__)[1:]
        own = [f for f in frames if not {"torch", "implicit_diffusion"} & set(f.filename.split("/"))]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        raise InvalidInputError(f"{name} fails on {on}: {type(error).__name__}: {lines[0]}{where}") from error


def reason_of(error: BaseException) -> str:
    """The message of an error; torch's advice to detach, which loses the gradients needed here, is replaced."""
    return str(error).replace(
        "Use tensor.detach().numpy() instead.", "NumPy passes no gradient on: use torch operations instead"
    )


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Raise `MemoryLimitError` where the device, or a 64-bit integer, cannot hold what the block allocates."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError) or any(word in str(error) for word in ("memory", "calculation overflow"))
        if isinstance(error, ImplicitDiffusionError) or not short:
            raise
        raise MemoryLimitError(f"{what} do not fit into memory; use fewer, or smaller ones") from error
