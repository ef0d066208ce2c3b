"""Arguments that are numbers, checked by name before any work."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from implicit_diffusion.errors import InvalidInputError


def check_count(name: str, value: Any, least: int = 1, otherwise: str = "") -> int:
    """The value as an integer ≥ `least`; raises `InvalidInputError` for anything else, or `otherwise`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InvalidInputError(f"{name} must be an integer ≥ {least}{otherwise}, got {value!r}")
    return int(value)


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a finite number in the open interval (low, high); raises `InvalidInputError` for anything else."""
    number = isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())
    if not number or isinstance(value, bool) or not low < float(value) < high:
        interval = {(-math.inf, math.inf): "be finite", (0.0, math.inf): "be positive and finite"}
        right = interval.get((low, high), f"lie in ({low:g}, {high:g})")
        raise InvalidInputError(f"{name} must {right}, got {value!r}")
    return float(value)
