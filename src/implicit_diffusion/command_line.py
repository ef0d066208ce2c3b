"""Options as the fields of frozen dataclasses: their help by tyro, their mistakes in one line.

The type of a field says what its option takes; None among its values says that the option may be left out, and is not
offered. A field of another dataclass stands for the options of that one, except those for which its metadata has a
reason under `without`. With `positional` in its metadata, a field is a word without a name.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from implicit_diffusion.errors import InvalidInputError

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
        return f"[{shown} ...]" if self._many else " ".join([shown] * self._count)

    @property
    def takes(self) -> str:
        """Its values in words."""
        if self.type is bool:
            return "no value"
        if typing.get_origin(self._one) is Literal:
            *others, last = map(str, typing.get_args(self._one))
            return ("any of " if self._many else "") + " or ".join(filter(None, [", ".join(others), last]))
        one, several = NAMES[self._one]
        return several if self._many else one if self._count == 1 else f"{NUMERALS[self._count]} {several}"

    @property
    def _many(self) -> bool:
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
        end = next((i for i, word in enumerate(rest) if _is_option(word)), len(rest))
        end = end if self._many else min(end, self._count)
        words, rest[:] = rest[:end], rest[end:]
        return words

    def refusal(self, words: Sequence[str]) -> str | None:
        """Why it does not take these words; None where it does."""
        if not self._many and len(words) != self._count:
            got = "nothing" if not words else " and ".join(map(repr, words))
            return f"{self.name} takes {self.takes}, got {got}"
        for word in words:
            if not _is_one(self._one, word):
                return f"{self.name} takes {self.takes}, got {word!r}"
        return None


def _is_one(kind: Any, word: str) -> bool:
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
            found += [option for option in options_of(kind) if option.field not in field.metadata["without"]]
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


def read(words: Sequence[str], commands: Mapping[str, type], *, prog: str, description: str) -> Any:
    """The configuration that a command line asks for; prints help, and ends with status 0, where it asks for that.

    Args:
        words: after the name of the program.
        commands: the configuration of every command.
        prog: the name of the program.
        description: of the program, for its help.

    Raises:
        InvalidInputError: a command line that cannot be read, with the option and what it takes.
        SystemExit: after the help.
    """
    if not {"-h", "--help"} & set(words) and not (words and words[0].startswith("--tyro-")):  # shell completion
        check(words, commands)
        return _parsed(words, commands, prog, description)
    shown = _Shown(sys.stdout)
    try:
        with contextlib.redirect_stdout(shown):
            _parsed(words, commands, prog, description)
    finally:
        print(fitted(shown.getvalue(), shutil.get_terminal_size().columns), end="")


class _Shown(io.StringIO):
    """Keeps what is printed, drawn as for the stream that it is meant for."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)


def fitted(text: str, width: int) -> str:
    """Break the lines that tyro does not: usage and description."""
    lines = []
    for line in text.splitlines():
        if len(line) > width and line[0] not in "│╭╰|+":
            words = line.replace(",", ", ") if "usage:" in line else line
            line = textwrap.fill(words, width, subsequent_indent="  ", break_on_hyphens=False)
        lines.append(line + "\n")
    return "".join(lines)


def _parsed(words: Sequence[str], commands: Mapping[str, type], prog: str, description: str) -> Any:
    named = tuple(
        Annotated[config, tyro.conf.subcommand(name, description=inspect.getdoc(config))]
        for name, config in commands.items()
    )
    union: Any = typing.Union[named]  # noqa: UP007
    return tyro.cli(
        union,
        prog=prog,
        description=description,
        args=words,
        config=(tyro.conf.DisallowNone,),
        registry=_registry(tuple(commands.values())),
    )


def _registry(configurations: Iterable[type]) -> Any:
    """Rules by which tyro reads our configurations."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def _rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type not in configurations:  # tyro has dataclasses of its own
            return None
        config: Any = info.type
        fields = []
        for option in options_of(config):
            default = tyro.MISSING if option.default is MISSING else option.default
            fields.append(StructFieldSpec(option.field, _annotated(option), default, option.text))
        return StructConstructorSpec(functools.partial(make, config), tuple(fields))

    return registry


def _annotated(option: Option) -> Any:
    """The type of an option for tyro: None is its default and not among its values."""
    default = option.default
    silent = default is None or default is False or default == ()
    hint = {"help_behavior_hint": ""} if silent else {}
    kind: Any = option.type | None if default is None else option.type
    marks = [tyro.conf.arg(metavar=None if option.type is bool else option.metavar, **hint)]  # type: ignore[call-overload]
    if option.type is bool and default is False:
        marks.append(tyro.conf.FlagCreatePairsOff)
    positional: Any = tyro.conf.Positional
    return Annotated[(positional[kind] if option.positional else kind, *marks)]


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


def check(words: Sequence[str], commands: Mapping[str, type]) -> None:
    """Raise `InvalidInputError` where words are no command with options that it takes, each once."""
    if not words:
        raise InvalidInputError(f"name a command: {', '.join(commands)}; --help says what each does")
    command, *rest = words
    if command not in commands:
        others = f"the commands are {', '.join(commands)}"
        raise InvalidInputError(f"there is no command {command!r}; {_nearest(command, commands) or others}")
    options, given = options_of(commands[command]), dict[str, Option]()
    spelled = {spelling: option for option in options if not option.positional for spelling in option.spellings}
    waiting = [option for option in options if option.positional]
    while rest:
        word = rest.pop(0)
        if not _is_option(word):
            if not waiting:
                raise InvalidInputError(f"{command} has no place for {word!r}{_after(given)}; see {command} --help")
            option = waiting.pop(0)
            values = [word]
        else:
            name, equals, value = word.partition("=")
            name = f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name
            if name not in spelled:
                reason = not_taken(commands[command]).get(name)
                guess = _nearest(name, spelled) or f"see {command} --help"
                raise InvalidInputError(reason or f"{command} has no option {name}; {guess}")
            option = spelled[name]
            if option.field in given:
                raise InvalidInputError(f"{option.name} is given twice; which of the two is meant?")
            values = [value] if equals else option.cut(rest)
        refusal = option.refusal(values)
        if refusal:
            raise InvalidInputError(refusal)
        given[option.field] = option
    missing = [option.name for option in options if option.default is MISSING and option.field not in given]
    if missing:
        raise InvalidInputError(f"{command} needs {' and '.join(missing)}; see {command} --help")


def _after(given: Mapping[str, Option]) -> str:
    """Which option stands before a word too many."""
    if not given:
        return ""
    option = list(given.values())[-1]
    return f" after {option.name}, which takes {option.takes}"


def _is_option(word: str) -> bool:
    """Whether a word is an option's name: a dash and a letter, and no number (-inf)."""
    return word.startswith("-") and word.lstrip("-")[:1].isalpha() and not _is_one(float, word)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else None
