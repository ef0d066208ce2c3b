"""Command lines: tyro reads them and writes their help; a mistake is one line that names the option and its values."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import tyro

from implicit_diffusion.commands.command_line.options import (
    MISSING,
    Option,
    is_option,
    make,
    not_taken,
    options_of,
    quoted,
)
from implicit_diffusion.errors import InvalidInputError


def read(words: Sequence[str], commands: Mapping[str, type], *, prog: str, description: str) -> Any:
    """The configuration that a command line asks for; where it asks for help, that is printed and the program ends.

    Args:
        words: those after the name of the program.
        commands: the configuration of every command; only that of the command that is given is looked up.
        prog: name of the program.
        description: of the program, for its help.

    Raises:
        InvalidInputError: a command line that cannot be read; the message names the option and what it takes.
        SystemExit: after the help, with status 0.
    """
    if not {"-h", "--help"} & set(words) and not (words and words[0].startswith("--tyro-")):  # shell completion
        for note in check(words, commands):
            print(note, file=sys.stderr)
        return _parsed(words, commands, prog, description)
    printed = _Captured(sys.stdout)
    try:
        with contextlib.redirect_stdout(printed):
            _parsed(words, commands, prog, description)
    finally:
        print(fitted(printed.getvalue(), shutil.get_terminal_size().columns), end="")


class _Captured(io.StringIO):
    """Captures what is printed; it looks like the stream that the text is meant for, so that boxes are drawn for it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self._stream.encoding)


def fitted(text: str, width: int) -> str:
    """The text with lines of at most `width`: tyro does not break those of usage and description."""
    lines = []
    for line in text.splitlines():
        if len(line) > width and line[0] not in "│╭╰|+":
            words = line.replace(",", ", ") if "usage:" in line else line
            indent = "  " if words is not line or line.startswith(" ") else ""
            line = textwrap.fill(words, width, subsequent_indent=indent, break_on_hyphens=False)
        lines.append(line + "\n")
    return "".join(lines)


def _parsed(words: Sequence[str], commands: Mapping[str, type], prog: str, description: str) -> Any:
    """Read by tyro: with the options of one command where one is given, else with those of all of them."""
    options: dict[str, Any] = {"config": (tyro.conf.DisallowNone,)}
    if words and words[0] in commands:
        config: Any = commands[words[0]]
        return tyro.cli(
            config,
            prog=f"{prog} {words[0]}",
            description=inspect.getdoc(config),
            args=words[1:],
            registry=_registry((config,)),
            **options,
        )
    named = tuple(
        Annotated[config, tyro.conf.subcommand(name, description=inspect.getdoc(config))]
        for name, config in commands.items()
    )
    union: Any = typing.Union[named]  # noqa: UP007
    registry = _registry(tuple(commands.values()))
    return tyro.cli(union, prog=prog, description=description, args=words, registry=registry, **options)


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
            default = tyro.MISSING if option.default is MISSING else () if option.repeatable else option.default
            fields.append(StructFieldSpec(option.field, _annotated(option), default, option.text))
        return StructConstructorSpec(functools.partial(_made, config), tuple(fields))

    return registry


def _made(config: type, **values: Any) -> Any:
    """The configuration; a repeatable option that was not given has its default, to which tyro would add."""
    absent = {option.field for option in options_of(config) if option.repeatable and not values[option.field]}
    return make(config, **{name: value for name, value in values.items() if name not in absent})


def _annotated(option: Option) -> Any:
    """The type of an option for tyro: None may be its default, and is not offered among its values."""
    default = option.default
    silent = default is None or default is False or default == () or (option.positional and option.many)
    hint = {"help_behavior_hint": ""} if silent else {}
    if option.repeatable:
        again = " ".join(["repeatable", *(["; default:", *map(str, default)] if default else [])]).replace(" ;", ";")
        hint = {"help_behavior_hint": f"({again})"}
    kind: Any = option.type | None if default is None else option.type
    marks = [tyro.conf.arg(metavar=None if option.type is bool else option.metavar, **hint)]  # type: ignore[call-overload]
    if option.type is bool and default is False:
        marks.append(tyro.conf.FlagCreatePairsOff)
    if option.repeatable:
        marks.append(tyro.conf.UseAppendAction)
    positional: Any = tyro.conf.Positional
    return Annotated[(positional[kind] if option.positional else kind, *marks)]


def check(words: Sequence[str], commands: Mapping[str, type]) -> list[str]:
    """Raise `InvalidInputError` unless the words are a command and options that it takes.

    Returns:
        What to tell the user of a command line that is read all the same, a line each.
    """
    notes: list[str] = []
    if not words:
        raise InvalidInputError(f"name a command: {', '.join(commands)}; --help says what each does")
    command, *rest = words
    if command not in commands:
        others = f"the commands are {', '.join(commands)}"
        raise InvalidInputError(f"there is no command {quoted(command)}; {_nearest(command, commands) or others}")
    options, given = options_of(commands[command]), dict[str, Option]()
    spelled = {spelling: option for option in options if not option.positional for spelling in option.spellings}
    waiting = [option for option in options if option.positional]
    while rest:
        word = rest.pop(0)
        if not is_option(word):
            if not waiting:
                raise InvalidInputError(
                    f"{command} does not expect {quoted(word)}{_after(given)}; see {command} --help"
                )
            option = waiting.pop(0)
            values = [word, *(option.cut(rest) if option.many else [])]
        else:
            name, equals, value = word.partition("=")
            name = f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name
            if name not in spelled:
                reason = not_taken(commands[command]).get(name)
                guess = _nearest(name, spelled) or f"see {command} --help"
                raise InvalidInputError(reason or f"{command} has no option {quoted(name)[1:-1]}; {guess}")
            option = spelled[name]
            values = [value] if equals else option.cut(rest)
            if option.field in given and not option.repeatable:
                notes.append(_twice(option, " ".join([name, *values])))
        refusal = option.refusal(values)
        if refusal:
            before = f"; {waiting[0].name} comes before {option.name}" if waiting and option.many else ""
            raise InvalidInputError(refusal + before)
        given[option.field] = option
    missing = [option.name for option in options if option.default is MISSING and option.field not in given]
    if missing:
        raise InvalidInputError(f"{command} needs {' and '.join(missing)}; see {command} --help")
    return notes


def _twice(option: Option, last: str) -> str:
    """A note that the last value of a repeated option counts.

    Raises:
        InvalidInputError: an option that takes several values, which belong behind one name.
    """
    if option.many:
        raise InvalidInputError(
            f"{option.name} is given twice; name all of its {option.takes} behind one {option.name}"
        )
    return f"{option.name} is given twice; what counts is {last}"


def _after(given: Mapping[str, Option]) -> str:
    """The option before a word for which there is no place, in words."""
    if not given:
        return ""
    option = list(given.values())[-1]
    return f" after {option.name}, which takes {option.takes}"


def _nearest(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else None
