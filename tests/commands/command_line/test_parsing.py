"""The words of every command line: the help of each command, and mistakes in each of its options, in one line."""

import dataclasses
import re
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from implicit_diffusion import __version__, cli
from implicit_diffusion.commands.command_line.options import make, options_of
from implicit_diffusion.commands.command_line.parsing import check, fitted, read
from implicit_diffusion.commands.registry import CONFIGURATIONS as COMMANDS
from implicit_diffusion.errors import InvalidInputError

OPTIONS = [(command, option) for command, config in COMMANDS.items() for option in options_of(config)]
NAMED = [(command, option) for command, option in OPTIONS if not option.positional]


def name(value):
    return value if isinstance(value, str) else value.field


def shown(words, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_terminal_and_offers_no_none(command, width, monkeypatch, capsys):
    text = shown([*filter(None, [command]), "--help"], monkeypatch, capsys, width)
    assert "None" not in text and "FLOAT" not in text and "(default: )" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_what_the_command_takes_and_nothing_else(command, monkeypatch, capsys):
    text = shown([command, "--help"], monkeypatch, capsys, 400)
    listed = re.findall(r"^[│ ] (PATH|--?[\w-]+)", text, re.MULTILINE)
    options = options_of(COMMANDS[command])
    words = [option.name for option in options if option.positional], [o.name for o in options if not o.positional]
    assert listed == [*words[0], "-h", *words[1]]
    flat = " ".join(text.split())
    for option in options_of(COMMANDS[command]):
        assert option.text in flat


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=name)
def test_help_names_no_option_that_the_command_lacks_and_no_folder_of_another(command, option):
    assert set(re.findall(r"--[a-z][a-z-]+", option.text)) <= {o.name for o in options_of(COMMANDS[command])}
    assert set(re.findall(r"runs/([a-z]+)-<", option.text)) <= {command}


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=name)
def test_every_option_is_described_in_sentences(command, option):
    assert option.text.endswith(".") and option.text[0] in '"ABCDEFGHIJKLMNOPQRSTUVWXYZ'
    assert not option.text.startswith("Of ") and len(option.text.split()) > 2


def test_help_says_what_is_taken_by_default(monkeypatch, capsys):
    text = " ".join(shown(["finetune", "--help"], monkeypatch, capsys, 400).split())
    assert "--seed INTEGER Seed of all random numbers. (default: 0)" in text
    assert "--kl-weight NUMBER Weight" in text and "--plan Do not train" in text


def refused(words):
    with pytest.raises(InvalidInputError) as error:
        check(words, COMMANDS)
    (line,) = str(error.value).splitlines()
    return line


def good(option):
    """Words that the option takes."""
    one = option.type
    if typing.get_origin(one) is tuple:
        arguments = [a for a in typing.get_args(one) if a is not ...]
        return [word for argument in arguments for word in good(option._replace(type=argument))]
    if typing.get_origin(one) is Literal:
        return [str(typing.get_args(one)[0])]
    return {int: ["3"], float: ["0.5"], bool: []}.get(one, ["x"])


def must(option):
    """The same with its name."""
    return [*([] if option.positional else [option.name]), *good(option)]


def wrong(option):
    """Words of another type; none where it takes any word."""
    one = typing.get_args(option.type)[0] if typing.get_origin(option.type) is tuple else option.type
    return [] if one in (str, Path, bool) else ["2.5.x", "None", ""]


@pytest.mark.parametrize(("command", "option"), NAMED, ids=name)
def test_a_mistake_in_any_option_is_one_line_that_names_it(command, option):
    takes = f"{option.name} takes {option.takes}, got "
    start = [command, *(word for o in options_of(COMMANDS[command]) if o.positional for word in good(o))]
    for word in wrong(option):
        words = [word, *good(option)[1:]]
        assert refused([*start, option.name, *words]) == takes + repr(word)
        assert refused([*start, f"{option.name}={word}"]) == takes + repr(word)
    if option.type is bool:
        assert refused([command, f"{option.name}=yes"]) == takes + "'yes'"
    else:
        assert refused([*start, option.name]) == takes + "nothing"
        assert refused([*start, option.name, "--help-me"]) == takes + "nothing"
    if not option.many and not any(o.positional and o.many for o in options_of(COMMANDS[command])):
        assert "does not expect 'more'" in refused([command, option.name, *good(option), *["more"] * 2])
    twice = [option.name, *good(option)] * 2
    if option.repeatable:
        assert check([command, *twice], COMMANDS) == []
    elif option.many:
        assert refused([command, *twice]).startswith(f"{option.name} is given twice; name all")
    elif option.default is not dataclasses.MISSING:
        needed = [w for o in options_of(COMMANDS[command]) if o.default is dataclasses.MISSING for w in must(o)]
        counts = " ".join([option.name, *good(option)])
        assert check([command, *needed, *twice], COMMANDS) == [f"{option.name} is given twice; what counts is {counts}"]
    slip = option.name + "q"
    assert refused([command, slip]).startswith(f"{command} has no option {slip}; did you mean --")
    assert option.name in refused([command, slip])


@pytest.mark.parametrize(("command", "option"), NAMED, ids=name)
def test_what_an_option_takes_is_read(command, option):
    needed = [o for o in options_of(COMMANDS[command]) if o.default is dataclasses.MISSING and o != option]
    others = [word for o in needed for word in must(o)]
    words = [command, *others, option.name.replace("-", "_").replace("__", "--", 1), *good(option)]
    chosen = read(words, COMMANDS, prog="x", description="y")
    held = next(c for c in (chosen, getattr(chosen, "each", None)) if hasattr(c, option.field))
    value = getattr(held, option.field)
    kind = typing.get_origin(option.type) or option.type
    assert value in typing.get_args(option.type) if kind is Literal else isinstance(value, kind)
    assert value is True if kind is bool else value != () and value is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a command: finetune, resume, .*--help"),
        (["finetun"], "no command 'finetun'; did you mean finetune?"),
        (["zzz"], "the commands are finetune, "),
        (["resume"], "resume needs PATH"),
        (["score", "--out", "x.npy"], "score needs --model and --data"),
        (["resume", "a", "b"], "does not expect 'b' after PATH"),
        (["resume", "--accept-changes", "model", "run"], "got 'run'; PATH comes before --accept-changes$"),
        (["finetune", "--num_steps", "x"], "--num-steps takes an integer, got 'x'"),
        (["finetune", "--lr", "-1e-3x"], "--lr takes a number, got '-1e-3x'"),
        (["sweep", "--target-kl-mode", "stop"], "--target-kl-mode is for one run"),
        (["finetune", "--reward", "a", "--lr", "x" * 5000], r"got 'x+\.\.\.x+'$"),
    ],
)
def test_mistakes_beside_options(words, message):
    assert re.search(message.replace("?", r"\?"), refused(words))


def test_numbers_below_zero_are_values():
    for number in ("-1", "-1e-3", "-.5", "-inf", "-nan"):
        check(["finetune", "--lr", number], COMMANDS)


def test_the_command_ends_with_status_2_and_one_line(capsys):
    assert cli.main(["finetune", "--lr", "abc"]) == 2
    assert capsys.readouterr() == ("", "error: --lr takes a number, got 'abc'\n")


def test_the_last_of_two_counts_and_that_is_said(capsys):
    words = ["hexagon", "--no-compile", "--steps", "20", "--compile", "--steps=30"]
    chosen = read(words, COMMANDS, prog="x", description="")
    assert chosen.compile is True and chosen.steps == 30
    said = ["--compile is given twice; what counts is --compile", "--steps is given twice; what counts is --steps 30"]
    assert capsys.readouterr().err.splitlines() == said


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert cli.main(["--version", "--plan"]) == 0
    assert capsys.readouterr().out == f"implicit-diffusion {__version__}, torch {torch.__version__}\n" * 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_seed_below_zero_is_refused_by_name(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if any(option.field == "seed" for option in options_of(COMMANDS[command])):
        needed = [w for o in options_of(COMMANDS[command]) if o.default is dataclasses.MISSING for w in must(o)]
        assert cli.main([command, *needed, "--seed", "-1"]) == 2
        assert capsys.readouterr().err == "error: --seed must be an integer ≥ 0, got -1\n"


@dataclass(frozen=True)
class Inner:
    """Inner."""

    a: int = 1
    """A number."""
    b: int | None = None
    """Another."""


@dataclass(frozen=True)
class Outer:
    """Outer."""

    inner: Inner = field(
        default_factory=Inner, metadata={"without": {"b": "b is not for outer"}, "texts": {"a": "Mine."}}
    )
    """What is within."""
    c: bool = True
    """A switch."""


@dataclass(frozen=True)
class Repeating:
    """Repeating."""

    names: tuple[str, ...] = field(default=("one",), metadata={"repeatable": True})
    """Names."""
    others: tuple[str, ...] = field(default=(), metadata={"repeatable": True})
    """Others."""


@dataclass(frozen=True)
class Around:
    """Around."""

    each: Repeating = field(default_factory=Repeating)
    """What is within."""


def test_a_repeatable_option_takes_one_value_each_time_and_the_first_replaces_its_default(monkeypatch, capsys):
    commands = {"repeating": Repeating, "around": Around}

    def names(*words):
        chosen = read(words, commands, prog="x", description="")
        return getattr(chosen, "each", chosen)

    for command in commands:
        assert names(command) == Repeating(("one",), ())
        assert names(command, "--names", "a") == Repeating(("a",), ())
        assert names(command, "--names", "a=2", "--others=-x", "--names=--b") == Repeating(("a=2", "--b"), ("-x",))
        with pytest.raises(InvalidInputError, match="does not expect 'b' after --names, which takes a name"):
            check([command, "--names", "a", "b"], commands)
    with pytest.raises(SystemExit):
        read(["repeating", "--help"], commands, prog="x", description="")
    text = " ".join(capsys.readouterr().out.split())
    assert "--names NAME Names. (repeatable; default: one)" in text and "Others. (repeatable)" in text


def test_nested_options_are_those_of_the_whole_less_what_it_does_not_take():
    assert [(o.field, o.text) for o in options_of(Outer)] == [("a", "Mine."), ("c", "A switch.")]
    assert make(Outer, a=3, c=False) == Outer(Inner(a=3), c=False)
    commands = {"outer": Outer, "inner": Inner}
    assert read(["outer", "--a", "5", "--no-c"], commands, prog="x", description="") == Outer(Inner(a=5), c=False)
    with pytest.raises(InvalidInputError, match="b is not for outer"):
        check(["outer", "--b", "5"], commands)


def test_long_lines_break_between_words():
    assert fitted("usage: x [-h] {one,two,three}\n", 20) == "usage: x [-h] {one,\n  two, three}\n"
    assert fitted("words that go on\n", 10) == "words that\ngo on\n"
    assert fitted("  words that go on\n", 10) == "  words\n  that go\n  on\n"
    assert fitted("│ " + "x" * 30 + "\n", 20) == "│ " + "x" * 30 + "\n"


@pytest.mark.slow
def test_help_without_a_terminal_or_its_letters():
    done = subprocess.run(
        [sys.executable, "-m", "implicit_diffusion", "hexagon", "--help"],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0 and b"\x1b" not in done.stdout
    assert max(map(len, done.stdout.decode("ascii").splitlines())) <= 80 + 5 * done.stdout.count(b"\\u")
