"""Summaries of commands as frozen dataclasses, to JSON and back.

A field whose default is None stands for a number that not every run has: where it is None, the JSON lacks it. Any other
None is null. A field `name` that is an `Estimate` has two keys, `name` and `name_se`; both are null where it is None.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.runs import RunDirectory

S = TypeVar("S")


def to_json(value: Any) -> Any:
    """Dataclasses and mappings as dictionaries, lists and tuples as lists, inside each other to any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints, content = get_type_hints(type(value)), dict[str, Any]()
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if _without_none(hints[field.name]) is Estimate:
                content[field.name], content[f"{field.name}_se"] = item or (None, None)
            elif item is not None or field.default is not None:
                content[field.name] = to_json(item)
        return content
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
        TypeError: fields that are missing, or that the dataclass does not have; a value of another type.
        KeyError: an estimate without its standard error.
    """
    if value is None and types.NoneType in get_args(kind):
        return None
    kind = _without_none(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints, values = get_type_hints(kind), dict(value)
        for name in hints.keys() & values.keys():
            if _without_none(hints[name]) is Estimate:
                mean, error = values[name], values.pop(f"{name}_se")
                none = mean is None and types.NoneType in get_args(hints[name])
                values[name] = None if none else Estimate(from_json(float, mean), from_json(float, error))
            else:
                values[name] = from_json(hints[name], values[name])
        return kind(**values)
    if origin is dict and isinstance(value, dict):
        return {name: from_json(arguments[1], item) for name, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return origin(from_json(arguments[0], item) for item in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    _check(kind, value)
    return value


def part_from_json(kind: type[S], content: Mapping[str, Any]) -> S:
    """A dataclass whose keys are among those of a flat mapping, which has the keys of other parts as well.

    Args:
        kind: the dataclass.
        content: the fields of several dataclasses, each from `to_json`.

    Raises:
        KeyError: a field is missing.
    """
    hints = get_type_hints(kind)
    keys = [*hints, *(f"{name}_se" for name, hint in hints.items() if _without_none(hint) is Estimate)]
    part: S = from_json(kind, {key: content[key] for key in keys})
    return part


def _check(kind: Any, value: object) -> None:
    """Raise `TypeError` unless a value of JSON is of one of the types that JSON has itself, or a word of a literal."""
    if get_origin(kind) is Literal:
        known = any(value == word and type(value) is type(word) for word in get_args(kind))
    else:
        known = kind is Any or type(value) is kind or (kind is float and type(value) is int)
    if not known:
        raise TypeError(f"{str(value)[:80]!r} is not what belongs there ({getattr(kind, '__name__', kind)})")


def _without_none(kind: Any) -> Any:
    """X for `X | None`; other types as they are, the first member of other unions."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    return next(option for option in get_args(kind) if option is not types.NoneType)


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
        summary: S = from_json(kind, read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"{path} is not what this release writes: {error}") from error
    return summary
