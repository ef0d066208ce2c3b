"""Arguments in messages of the library become flags of the command, where it has them."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from implicit_diffusion import cli
from implicit_diffusion.commands.command_line.flags import OPTIONS, PHRASES, with_flags
from implicit_diffusion.commands.command_line.options import options_of
from implicit_diffusion.commands.registry import CONFIGURATIONS


@dataclass(frozen=True)
class Config:
    """Options."""

    lr: float = 0.1
    """A rate."""
    out: Path | None = None
    """A folder."""
    accept_changes: tuple[str, ...] = ()
    """Names."""
    no_clip: bool = False
    """A switch that is off."""
    weighted: bool = True
    """A switch that is on."""
    precision: str = "float32"
    """A name."""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("lr must be positive and finite, got -1.0", "--lr must be positive and finite, got -1.0"),
        ("lr 3 is not one", "lr 3 is not one"),
        ("take a smaller `lr`, or another `path`", "take a smaller --lr, or another --out"),
        ("`folder` a/b is a file", "--out a/b is a file"),
        ("use `precision='bf16'` or float32", "use --precision bf16 or float32"),
        ("use `precision=torch.bfloat16`, or float32", "use --precision bf16, or float32"),
        ("add `accept_changes=['model', 'data']`", "add --accept-changes model data"),
        ("build it with `clip=False`", "build it with --no-clip"),
        ("use `weighted=False`", "use --no-weighted"),
        ("use `weighted=True`", "use --weighted"),
        ("use `no_clip=False`", "use `no_clip=False`"),
        ("use `lr=RATE`", "use --lr RATE"),
        ("`batch` is not an option, `implicit-diffusion resume x` is a command", None),
    ],
)
def test_arguments_become_flags(message, expected):
    assert with_flags(message, Config) == (message if expected is None else expected)


def test_the_table_names_options_that_some_command_has():
    fields = {option.field for config in CONFIGURATIONS.values() for option in options_of(config)}
    assert {*chain(*OPTIONS.values()), *(phrase.partition("=")[0] for phrase in PHRASES.values())} <= fields


def test_the_command_line_translates_what_the_library_says(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["hexagon", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path}/file is a file; name a new folder\n"
