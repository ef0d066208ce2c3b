"""Options as the fields of frozen dataclasses.

The type of a field says what values its option takes. Where None is among them, the option may be left out; None itself
is not offered; of other unions, the first type counts. A tuple field with `repeatable` in its metadata is an option
that may be given several times, with one value each. A field whose type is another dataclass stands for the options of
that one. Its metadata may leave some of them out (`without`, by name, each with the reason) and may give some another
help text (`texts`, by name). A field with `positional` in its metadata is a word without a name.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import reprlib
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

NAMES = {int: ("an integer", "integers"), float: ("a number", "numbers"), Path: ("a path", "paths")}
NAMES |= {str: ("a name", "names")}
METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "NAME"}
NUMERALS = {2: "two", 3: "three", 4: "four"}
MISSING = dataclasses.MISSING


class Option(NamedTuple):
    """One option: the field, its type without None, its default (`MISSING` where it is required), and its help."""

    field: str
    type: Any
    default: Any
    text: str
    positional: bool
    repeatable: bool = False

    @property
    def name(self) -> str:
        """The option as it is written on a command line."""
        return METAVARS[self._one] if self.positional else f"--{self.field.replace('_', '-')}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All of its names: a switch that is not off by default has a second one that switches it off."""
        switch = self.type is bool and self.default is not False
        return (self.name, f"--no-{self.name[2:]}") if switch else (self.name,)

    @property
    def metavar(self) -> str:
        """The word that stands for its value in the help."""
        one = self._one
        shown = METAVARS.get(one) or "{" + ",".join(map(str, typing.get_args(one))) + "}"
        return f"{shown} ..." if self.many else " ".join([shown] * self._count)

    @property
    def takes(self) -> str:
        """Its values in words."""
        if self.type is bool:
            return "no value"
        if typing.get_origin(self._one) is Literal:
            *others, last = map(str, typing.get_args(self._one))
            return ("any of " if self.many else "") + " or ".join(filter(None, [", ".join(others), last]))
        one, several = NAMES[self._one]
        return several if self.many else one if self._count == 1 else f"{NUMERALS[self._count]} {several}"

    @property
    def many(self) -> bool:
        """Whether one or more words follow it."""
        return typing.get_args(self.type)[1:] == (...,) and not self.repeatable

    @property
    def _count(self) -> int:
        """The number of words that follow it, where that is fixed."""
        if self.type is bool:
            return 0
        if self.repeatable:
            return 1
        return len(typing.get_args(self.type)) if typing.get_origin(self.type) is tuple else 1

    @property
    def _one(self) -> Any:
        """The type of one value."""
        return typing.get_args(self.type)[0] if typing.get_origin(self.type) is tuple else self.type

    def cut(self, rest: list[str]) -> list[str]:
        """Remove the words that follow its name, up to the next option, from a command line; returns them."""
        end = next((i for i, word in enumerate(rest) if is_option(word)), len(rest))
        end = end if self.many else min(end, self._count)
        words, rest[:] = rest[:end], rest[end:]
        return words

    def refusal(self, words: Sequence[str]) -> str | None:
        """Why these words cannot be its values; None where they can."""
        if len(words) < 1 if self.many else len(words) != self._count:
            got = "nothing" if not words else " and ".join(map(quoted, words))
            return f"{self.name} takes {self.takes}, got {got}"
        for word in words:
            if not is_one(self._one, word):
                return f"{self.name} takes {self.takes}, got {quoted(word)}"
        return None


def quoted(word: str) -> str:
    """A word in quotes; the middle of a very long one is left out."""
    return _REPR.repr(word)


_REPR = reprlib.Repr()
_REPR.maxstring = 100


def is_one(kind: Any, word: str) -> bool:
    """Whether a word is a value of this type."""
    if typing.get_origin(kind) is Literal:
        return word in map(str, typing.get_args(kind))
    try:
        kind(word)
    except ValueError:
        return False
    return True


@functools.cache
def options_of(config: type) -> tuple[Option, ...]:
    """All options of a configuration in the order of its fields; those of a nested one stand in its place."""
    hints, texts = typing.get_type_hints(config), _texts(config)
    options: list[Option] = []
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            without, own = (field.metadata.get(name, {}) for name in ("without", "texts"))
            taken = [option for option in options_of(kind) if option.field not in without]
            options += [option._replace(text=own.get(option.field, option.text)) for option in taken]
            continue
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(one for one in typing.get_args(kind) if one is not type(None))
        default = field.default if field.default_factory is MISSING else field.default_factory()
        positional, repeatable = (field.metadata.get(mark, False) for mark in ("positional", "repeatable"))
        options.append(Option(field.name, kind, default, texts[field.name], positional, repeatable))
    return tuple(options)


def _texts(config: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, each in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), f"{field.target.id}: no text"
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def not_taken(config: type) -> dict[str, str]:
    """Options of nested configurations that this one leaves out, by flag, each with the reason."""
    reasons: dict[str, str] = {}
    for field in dataclasses.fields(config):
        reasons |= {f"--{name.replace('_', '-')}": why for name, why in field.metadata.get("without", {}).items()}
    return reasons


def make(config: type, **values: Any) -> Any:
    """A configuration with these values; those of nested configurations go to these."""
    hints, given = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            names = {option.field for option in options_of(kind)} & values.keys()
            given[field.name] = make(kind, **{name: values[name] for name in names})
        elif field.name in values:
            given[field.name] = values[field.name]
    return config(**given)


def is_option(word: str) -> bool:
    """Whether a word is the name of an option: a dash and a letter, but not a number such as -inf."""
    return word.startswith("-") and word.lstrip("-")[:1].isalpha() and not is_one(float, word)
