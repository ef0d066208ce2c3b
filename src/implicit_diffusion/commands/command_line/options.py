"""Options as the fields of frozen dataclasses.

The type of a field says what its option takes; None among its values says that the option may be left out, and is not
offered. A field of another dataclass stands for the options of that one, except those for which its metadata has a
reason under `without`; `texts` has the help of those that mean something else there. With `positional` in its metadata,
a field is a word without a name.
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

    @property
    def name(self) -> str:
        """As it is written on a command line."""
        return METAVARS[self.type] if self.positional else f"--{self.field.replace('_', '-')}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All of its names: what is on, or is not off by default, can be switched off."""
        switch = self.type is bool and self.default is not False
        return (self.name, f"--no-{self.name[2:]}") if switch else (self.name,)

    @property
    def metavar(self) -> str:
        """What stands for its value in the help."""
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
        """Whether any number of words may follow it, one at least."""
        return typing.get_args(self.type)[1:] == (...,)

    @property
    def _count(self) -> int:
        """How many words follow it, where it takes a fixed number."""
        if self.type is bool:
            return 0
        return len(typing.get_args(self.type)) if typing.get_origin(self.type) is tuple else 1

    @property
    def _one(self) -> Any:
        """The type of one value."""
        return typing.get_args(self.type)[0] if typing.get_origin(self.type) is tuple else self.type

    def cut(self, rest: list[str]) -> list[str]:
        """Take the words that follow its name, up to the next option, off the rest of a command line."""
        end = next((i for i, word in enumerate(rest) if is_option(word)), len(rest))
        end = end if self.many else min(end, self._count)
        words, rest[:] = rest[:end], rest[end:]
        return words

    def refusal(self, words: Sequence[str]) -> str | None:
        """Why it does not take these words; None where it does."""
        if len(words) < 1 if self.many else len(words) != self._count:
            got = "nothing" if not words else " and ".join(map(quoted, words))
            return f"{self.name} takes {self.takes}, got {got}"
        for word in words:
            if not is_one(self._one, word):
                return f"{self.name} takes {self.takes}, got {quoted(word)}"
        return None


def quoted(word: str) -> str:
    """A word in quotes, its middle left out where it is very long."""
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
    """All options of a configuration in the order of its fields, those of nested ones in their place."""
    hints, texts, found = typing.get_type_hints(config), _texts(config), []
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            without, own = (field.metadata.get(name, {}) for name in ("without", "texts"))
            taken = [option for option in options_of(kind) if option.field not in without]
            found += [option._replace(text=own.get(option.field, option.text)) for option in taken]
            continue
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found.append(Option(field.name, kind, default, texts[field.name], field.metadata.get("positional", False)))
    return tuple(found)


def _texts(config: type) -> dict[str, str]:
    """What the strings below the fields of a dataclass say, in one line each."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), f"{field.target.id}: no text"
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def not_taken(config: type) -> dict[str, str]:
    """Options of nested configurations that this one does not take, with the reason."""
    reasons: dict[str, str] = {}
    for field in dataclasses.fields(config):
        reasons |= {f"--{name.replace('_', '-')}": why for name, why in field.metadata.get("without", {}).items()}
    return reasons


def make(config: type, **values: Any) -> Any:
    """A configuration of these values, nested ones with theirs."""
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
    """Whether a word is an option's name: a dash and a letter, and no number (-inf)."""
    return word.startswith("-") and word.lstrip("-")[:1].isalpha() and not is_one(float, word)
