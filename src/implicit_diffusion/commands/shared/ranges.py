"""Ranges of options: one wording for what is wrong with a number, in all commands.

Options that are None have a default elsewhere, and are accepted.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from implicit_diffusion.errors import LARGEST_INTEGER, InvalidInputError

WORDS = {  # for `advice`
    "weigh": "--weighted",
    "rate": "--lr",
    "particles": "--particles",
    "step": "--step-size",
    "tune": "add --adapt-step",
    "decay": "--weight-decay",
}


def at_least(config: Any, **least: int) -> None:
    """Raise `InvalidInputError` where an integer option is below its least value, or too large to count or to seed."""
    for name, lowest in least.items():
        value, most = getattr(config, name), 2**63 - 1 if name == "seed" else LARGEST_INTEGER
        if value is not None and value < lowest:
            raise InvalidInputError(f"{option(name)} must be an integer ≥ {lowest}, got {value}")
        if value is not None and value > most:
            raise InvalidInputError(f"{option(name)} must be an integer ≤ {most}, got {value}")


def positive(config: Any, *names: str) -> None:
    """Raise `InvalidInputError` where an option is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidInputError(f"{option(name)} must be positive and finite, got {value}")


def not_negative(config: Any, *names: str) -> None:
    """Raise `InvalidInputError` where an option is negative, NaN or infinite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise InvalidInputError(f"{option(name)} must be finite and ≥ 0, got {value}")


def check_size(size: tuple[int, int] | None) -> None:
    """Raise `InvalidInputError` where a height or a width is not positive, or too large to count."""
    if size is not None and not all(1 <= side <= LARGEST_INTEGER for side in size):
        raise InvalidInputError(f"--size must be a height and a width in pixels, got {size[0]} {size[1]}")


def option(name: str, value: object = None) -> str:
    """A field as it is typed on the command line; `--no-` where a flag is False."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def command(name: str, settings: Mapping[str, object]) -> str:
    """The command line with these settings, quoted for a shell; the option of a list is repeated for each value."""
    words = [f"implicit-diffusion {name}"]
    pairs = ((key, one) for key, value in settings.items() for one in (value if isinstance(value, list) else [value]))
    for key, value in pairs:
        values = [shlex.quote(str(one)) for one in (value if isinstance(value, tuple) else (value,))]
        flag, join = option(key, value), "=" if values[:1] and values[0].startswith("-") else " "  # or it is an option
        words.append(flag if isinstance(value, bool) else join.join([flag, " ".join(values)]))
    return " \\\n  ".join(words)
