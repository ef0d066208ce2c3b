"""Summaries of commands as frozen dataclasses, to JSON and back.

A field whose default is None stands for a number that not every run has: where it is None, the JSON lacks it. Any other
None is null.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory

S = TypeVar("S")


def to_json(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries, lists and tuples as lists, inside each other to any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: to_json(item) for field, item in pairs if not (item is None and field.default is None)}
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def from_json(kind: Any, value: Any) -> Any:
    """The way back.

    Args:
        kind: the type of what is wanted: a dataclass, a list, tuple or dict of such, one of these or None, or any type
            that JSON has itself.
        value: from `to_json`.

    Raises:
        TypeError: fields that are missing, or that the dataclass does not have.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if value is None:
        return None
    if origin in (Union, types.UnionType):
        return from_json(next(option for option in arguments if option is not types.NoneType), value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints.get(name, Any), item) for name, item in value.items()})
    if origin is dict:
        return {name: from_json(arguments[1], item) for name, item in value.items()}
    if origin in (list, tuple):
        return origin(from_json(arguments[0], item) for item in value)
    return value


def read_summary(kind: type[S], directory: RunDirectory) -> S:
    """The summary.json of a finished run.

    Args:
        kind: the dataclass that it was written from.
        directory: of the run.

    Raises:
        InvalidInputError: a summary of another release, with other fields.
    """
    path = directory.path / "summary.json"
    try:
        summary: S = from_json(kind, json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"{path} is not what this release writes: {error}") from error
    return summary
