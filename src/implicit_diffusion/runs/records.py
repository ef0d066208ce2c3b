"""Values as JSON has them: what goes into the files of a run.

JSON is strict here: NaN and infinity, which it does not have, are refused by name instead of written.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.processes import main_only


def as_json(value: Any, key: str = "") -> Any:
    """`value` as JSON has it: dataclasses and mappings as dicts, tensors and arrays as numbers, paths as strings.

    Args:
        value: anything made of the above, sequences, strings, numbers, booleans and None.
        key: its name in error messages.

    Raises:
        NonFiniteError: NaN or infinity inside; the message names its key.
        InvalidInputError: something inside that JSON cannot hold.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): as_json(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"{key or 'value'} is {value}, which is not written to a file")
    if isinstance(value, str | Path):
        text = str(value)
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # half a letter: how Python reads what is not UTF-8
            raise InvalidInputError(f"{key or 'value'} is {text!a}, which is not UTF-8")
        return text
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InvalidInputError(f"{key or 'value'} is a {type(value).__name__}, which JSON cannot hold")


def as_line(row: Mapping[str, Any]) -> str:
    """One line of metrics.jsonl, with its end; errors as in `as_json`."""
    return json.dumps(as_json(row), ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, or none that can be read."""
    with suppress(InvalidInputError):
        return read_json(path)
    return None


@main_only
def write(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; errors as in `as_json`.

    Raises:
        StorageError: it cannot be written.
    """
    text = json.dumps(as_json(value), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as file:
        file.write_text(text + "\n", encoding="utf-8")


def read_back(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, with numbers for what is on a device, in one copy: each copy would wait for the device."""
    waiting = [value for row in rows for value in row.values() if _is_away(value)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else ())
    for row in rows:
        yield {name: next(numbers) if _is_away(value) else value for name, value in row.items()}


def _is_away(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point() and value.device.type != "cpu"
