"""How numbers are written, to the digits that their standard errors support, and how words of users are escaped."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path

DASH = "—"  # for a number that does not exist


def decimals(scale: float, digits: int = 1) -> int:
    """Decimal places that show `digits` significant digits of `scale`; 0 for numbers above them, 3 without a scale."""
    if not (math.isfinite(scale) and scale > 0):
        return 3
    return min(8, max(0, digits - 1 - math.floor(math.log10(scale))))


def number(value: float | None, error: float | None = None, *, sign: bool = False, digits: int = 3) -> str:
    """`value ± error`, both to one significant digit of the error; `digits` significant digits without error.

    A proper minus sign, and a dash for a number that does not exist.
    """
    if value is None or not math.isfinite(value):
        return DASH
    plus = "+" if sign else ""
    if error is None or not math.isfinite(error) or error <= 0:
        text = f"{value:{plus}.{decimals(abs(value), digits)}f}" if value else "0"
    else:
        places = decimals(error)
        text = f"{value:{plus}.{places}f} ±\N{NO-BREAK SPACE}{error:.{places}f}"
    return text.replace("-", "−")


def beside(value: float | None, error: float | None) -> str:
    """`value` alone, to as many decimals as its `error`, written elsewhere, supports."""
    if value is None or error is None or not math.isfinite(error) or error <= 0:
        return number(value, digits=4)
    return f"{value:.{decimals(error)}f}".replace("-", "−")


def percent(share: float | None, error: float | None = None) -> str:
    """A share in per cent, to a tenth where it has no error."""
    if share is None:
        return DASH
    text = f"{100 * share:.1f}" if error is None else number(100 * share, 100 * error)
    return f"{text}\N{NO-BREAK SPACE}%"


def markdown(text: object) -> str:
    """A string of a user (a path, a name) as plain words of a Markdown document, in one line.

    HTML and Markdown in it are escaped; characters that cannot be printed become U+FFFD.
    """
    words = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(words, quote=False))


def distinct(values: Sequence[float], digits: int = 4) -> list[str]:
    """Numbers in `digits` significant digits, or in as many as make all different numbers look different."""
    for enough in range(digits, 17):
        texts = [f"{value:.{enough}g}" for value in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return [repr(value) for value in values]


NAMELESS = {"model", "models", "pipeline", "checkpoint", "final", "last", "latest", "best", "output", "out"}


def model_name(model: object) -> str:
    """A short name of a model: its hub id, or the last part of its path; the last two where the last is in `NAMELESS`.

    A folder of the hub's cache, `models--owner--name/snapshots/<revision>`, is `owner/name`.
    """
    if not Path(str(model)).is_absolute():  # a configuration's folders are
        return str(model)
    parts = Path(str(model)).parts[1:] or ("/",)
    for part in parts:
        if cached := re.fullmatch(r"models--(.+?)--(.+)", part):
            return "/".join(cached.groups())
    return "/".join(parts[-2:] if parts[-1].lower() in NAMELESS else parts[-1:])
