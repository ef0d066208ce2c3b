"""The registry of commands: what it names is there, and what commands say of their options is fit for `--help`."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

from implicit_diffusion.commands.registry import COMMANDS, CONFIGURATIONS, _load
from implicit_diffusion.errors import InvalidInputError

HEAVY = {"diffusers", "matplotlib", "peft", "sklearn", "transformers"}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_an_entry_names_what_is_there(command):
    assert is_dataclass(command.config) and CONFIGURATIONS[command.name] is command.config
    parameters = list(inspect.signature(_load(command.run_place)).parameters)
    assert parameters[0] == "config"
    if command.resumable:
        assert parameters[1] == "directory"
        assert list(inspect.signature(_load(command.report_place)).parameters) == ["directory"]
        names = {field.name for field in fields(command.config)}
        assert {"out"} <= names and not {"command", "version"} & names  # which config.json has beside them
    assert (command.last_file is None) is (not command.resumable)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_descriptions_break_after_sentences_only_and_none_is_missing(command):
    """What `--help` says of an option keeps the line breaks of the source: these must not split a sentence."""
    (config,) = ast.parse(inspect.getsource(command.config)).body
    for option, text in zip(config.body, config.body[1:]):
        if isinstance(option, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{option.target.id} has no description"
            first_lines = text.value.value.split("\n")[:-1]
            assert all(line.rstrip().endswith(".") for line in first_lines), text.value.value


@pytest.mark.slow
def test_a_command_costs_only_its_own_modules():
    """Reading the options of one command imports neither another command nor a heavy package."""
    program = (
        "import sys; from implicit_diffusion import cli; from implicit_diffusion.commands.registry import COMMANDS\n"
        "COMMANDS['recovery'].config, COMMANDS['resume'].config\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))\n"
        "print(sorted({name.split('.')[2] for name in sys.modules if name.startswith('implicit_diffusion.commands.')}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    packages, rooms = done.stdout.splitlines()
    assert packages == "[]", done.stderr
    assert not {"finetune", "sweep", "ebm", "pretrain", "tilt", "sample"} & set(ast.literal_eval(rooms))


def test_numbers_that_no_machine_counts_to_are_refused():
    for command, option, value in (
        ("finetune", "batch", 2**31),
        ("pretrain", "batch", 10**30),
        ("pretrain", "seed", 2**63),
    ):
        with pytest.raises(InvalidInputError, match=f"--{option} must be an integer ≤ "):
            CONFIGURATIONS[command](**{option: value}).check()
