"""Reading of untrusted files: those of the wrong kind are refused with an error of one line.

A path may name a pipe that never answers, a device that never ends, a folder or a file of terabytes, and JSON may be
nested deeper than a parser's stack. Only regular files are read, up to a maximal size and a maximal depth.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError

MOST_BYTES = 2**26  # twice the largest vocabularies of tokenizers
DEEPEST = 64  # levels of lists and mappings
LONGEST_REASON = 400  # characters of another library's message


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The contents of a regular file.

    Raises:
        InvalidInputError: it cannot be read, is a folder, a pipe or a device, or holds more than `most` bytes.
    """
    try:
        # Without waiting: opening a pipe would block until another process writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            refuse_unless_regular(path, os.fstat(descriptor).st_mode)
            with open(descriptor, "rb", closefd=False) as file:
                contents = file.read(most + 1)
        finally:
            os.close(descriptor)
    except InvalidInputError:
        raise
    except (OSError, ValueError) as error:  # a ValueError for a path with a zero byte
        raise InvalidInputError(f"{path} cannot be read ({one_line(error)})") from error
    if len(contents) > most:
        raise InvalidInputError(f"{path} is larger than {most} bytes, the most that such a file may have")
    return contents


def refuse_unless_regular(path: Path, mode: int) -> None:
    """Raise `InvalidInputError` unless `mode`, from its stat, is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise InvalidInputError(f"{path} is {kind}, and only regular files are read")


def read_json(path: Path, most: int = MOST_BYTES, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        most: bytes that it may have.
        finite: whether it must be strict JSON, which has neither NaN nor infinity; schedulers of diffusers have some.

    Raises:
        InvalidInputError: as `read_bytes`; it is not JSON, not an object, or has more than `DEEPEST` levels.
    """
    return parse_json(path, read_bytes(path, most), finite=finite)


def parse_json(path: Path, contents: bytes, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in the contents of a file; arguments and errors as in `read_json`."""
    number = _finite if finite else float
    try:
        value = json.loads(contents.decode("utf-8"), parse_constant=number, parse_float=number)
    except RecursionError:
        raise InvalidInputError(f"{path} is nested deeper than {DEEPEST} levels") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise InvalidInputError(f"{path} is not valid JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{path} holds a JSON {type(value).__name__}, but must hold an object")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return value
    raise InvalidInputError(f"{path} is nested deeper than {DEEPEST} levels")


def _finite(number: str) -> float:
    """A number of JSON, or one of the words that Python reads there as well: NaN, Infinity, -Infinity."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is not a finite number")
    return value


def one_line(error: object) -> str:
    """The message of an error of another library, in one line of limited length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + " …"
