"""Options in their ranges: one wording for what is wrong with a number, whichever experiment it belongs to.

Options that are None have a default elsewhere, and pass.
"""

from __future__ import annotations

import math
from typing import Any

from implicit_diffusion.errors import InvalidInputError


def at_least(config: Any, **least: int) -> None:
    """Raise `InvalidInputError` where an integer option is below its least value."""
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise InvalidInputError(f"{_option(name)} must be an integer ≥ {lowest}, got {value}")


def positive(config: Any, *names: str) -> None:
    """Raise `InvalidInputError` where an option is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidInputError(f"{_option(name)} must be positive and finite, got {value}")


def not_negative(config: Any, *names: str) -> None:
    """Raise `InvalidInputError` where an option is negative, NaN or infinite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise InvalidInputError(f"{_option(name)} must be finite and ≥ 0, got {value}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
