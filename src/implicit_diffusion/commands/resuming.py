"""Continue an interrupted run, or write the report of a finished one again, whichever command it belongs to."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from implicit_diffusion import __version__
from implicit_diffusion.commands.registry import COMMANDS, Command
from implicit_diffusion.commands.rewards.trust import check_trust
from implicit_diffusion.commands.rewards.weights import functions_in
from implicit_diffusion.commands.shared.inputs import inputs
from implicit_diffusion.commands.shared.models.factories import check_models, with_code
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError, check_path
from implicit_diffusion.files.foreign import check_folder, consistent
from implicit_diffusion.processes import from_main, main_only
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.provenance import Change, check_version, device_of, verified

RESULTS = ("model", "report.html", "figures", "summary.json")  # of a run, as far as it has them
PARTS = ("model", "figures", "checkpoint", "judged", "plan", "course", "start")  # folders in that of a run


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run, bit for bit as if it had not been interrupted."""

    run: Path = field(metadata={"positional": True})
    """The folder of the run."""
    accept_changes: tuple[Change, ...] = ()
    """Changes to accept since the run began; any other change is refused by name."""
    trust_reward: bool = False
    """Run the code of the reward that the folder names, even if it lies there, has changed, or is not known here."""
    trust_model: bool = False
    """Run the code that makes the model of the run, FILE.py:factory, in the same cases."""


def run_resume(config: Resume) -> dict[str, Any]:
    """The command `resume`."""
    trust = {"trust_reward": config.trust_reward, "trust_model": config.trust_model}
    return resume(config.run, config.accept_changes, **trust)


def resume(
    path: str | PathLike[str],
    accept_changes: Collection[str] = (),
    *,
    trust_reward: bool = False,
    trust_model: bool = False,
) -> dict[str, Any]:
    """Continue an interrupted run, bit for bit as if it had not been interrupted; returns its summary.

    Args:
        path: the run directory.
        accept_changes: changes of what the run rests on, by names of `runs.provenance.Change`; others are refused.
        trust_reward: run the code of the reward that the directory names, though this user has not named it, and
            whether or not it has changed.
        trust_model: run the code that makes its model in the same cases.

    Raises:
        InvalidInputError: there is no interrupted run; another version began it; what it rests on has changed; its
            reward or its model is code that is not to be trusted.
    """
    path = check_path("the folder of a run", path).absolute()
    directory = open_run(path)
    with directory.held():
        command, values, finished = from_main(lambda: _interrupted(directory))
        check_version(directory, accept_changes)
        if finished:
            _adopt(directory, command, values)
            with consistent(path):
                return command.report(directory)
        config: Any = dataclasses.replace(read_options(command.config, directory), out=path)
        if not trust_reward:
            _check_trust(config, path)
        check_models(config, path, trusted=trust_model)
        trusted = (*["reward"] * trust_reward, *(with_code(config) if trust_model else ()))
        with verified(directory, (*accept_changes, *trusted), inputs(config)):
            _adopt(directory, command, values)
            device = device_of(directory)
            if device is not None and "device" in values:
                config = dataclasses.replace(config, device=device)
            try:
                config.check()
            except (TypeError, ValueError, AttributeError) as error:
                if isinstance(error, ImplicitDiffusionError):
                    raise
                raise InvalidInputError(f"{path}/config.json cannot be used: {error}") from error
            return command.run(config, directory)


@main_only
def _check_trust(config: Any, path: Path) -> None:
    """Refuse options with a reward or a judge that is not to be trusted; see `trust.check_trust`."""
    for name in functions_in(config):
        check_trust(name, path, getattr(config, "reward_python", None))


def _interrupted(directory: RunDirectory) -> tuple[Command, dict[str, Any], bool]:
    """The command of an interrupted run, its options, and whether all is done except what its report is made of.

    Raises:
        InvalidInputError: there is no interrupted run.
    """
    path = directory.path
    finished = (path / "summary.json").exists()
    if not finished and not (path / "config.json").exists():
        if (path / "plan.json").exists():
            raise InvalidInputError(
                f"{path} is not an interrupted run: it holds a plan; to train, use "
                f"`finetune --out {shlex.quote(str(path))}`"
            )
        raise InvalidInputError(
            f"{path} is not an interrupted run: no run has begun in it; repeat the command that was to begin one"
        )
    command, values = command_of(directory)
    check_no_plan(path, values)
    assert command.last_file is not None
    if finished and (path / command.last_file).exists():
        raise InvalidInputError(f"{path} is not an interrupted run: it is finished; {_results(path)}")
    return command, values, finished


@main_only
def report(path: str | PathLike[str]) -> dict[str, Any]:
    """Draw the figures of a finished run, and write its report, from what is on disk; returns the summary.

    Raises:
        InvalidInputError: there is no finished run; another version made it; its figures are not made from what is on
            disk.
    """
    path = check_path("the folder of a run", path)
    directory = open_run(path)
    with directory.held():
        if not (path / "summary.json").exists():
            if not (path / "config.json").exists():
                raise InvalidInputError(
                    f"{path} is not a finished run: no run has begun in it; repeat the command that was to begin one"
                )
            check_no_plan(path, directory.read_config() or {})
            raise InvalidInputError(
                f"{path} is not finished: it has no summary.json; {directory.resume_command} continues it"
            )
        command, _ = command_of(directory)
        check_version(directory, advice="draw its report with that version")
        with consistent(path):
            return command.report(directory)


def check_no_plan(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a folder with a finished plan, which there is nothing to continue or to draw again of."""
    if values.get("plan") and (path / "plan.json").exists():
        raise InvalidInputError(
            f"{path} holds a finished plan and no training; to train, use `finetune --out {shlex.quote(str(path))}` "
            "with the other options of the plan"
        )


def _results(path: Path) -> str:
    """Where the results of a finished run are, by what is there, and how they are drawn again."""
    there = ", ".join(f"{path / name}" for name in RESULTS if (path / name).exists())
    return f"its results are in {there}; `implicit-diffusion report {shlex.quote(str(path))}` draws it again"


@main_only
def open_run(path: Path) -> RunDirectory:
    """The folder of a run.

    Raises:
        InvalidInputError: there is none; a sweep, or a part of a run.
    """
    if not path.is_dir():
        raise InvalidInputError(f"there is no run {path}; name the folder that --out named")
    check_folder(path)
    directory = RunDirectory(path)
    origin = directory.read_origin()
    if any(path.glob("beta-*")) or (origin is not None and origin.command == "sweep"):
        raise InvalidInputError(
            f"{path} is a sweep; to continue it, repeat the `sweep` command that began it, and to compare its runs, "
            f"use `implicit-diffusion report {shlex.quote(str(path))}/beta-*`"
        )
    if not (path / "config.json").exists() and path.name in PARTS and (path.parent / "config.json").exists():
        raise InvalidInputError(f"{path} is part of a run; name the run itself, {path.parent}")
    return directory


def command_of(directory: RunDirectory) -> tuple[Command, dict[str, Any]]:
    """The command that began a run, and its options, by config.json."""
    values, origin = directory.read_config(), directory.read_origin()
    if values is None or origin is None:
        raise InvalidInputError(
            f"{directory.path}/config.json does not say which command and which version began this run, so that it "
            "can be neither resumed nor drawn again; give its command again, with another --out"
        )
    command = COMMANDS.get(origin.command)
    if command is None or not command.resumable:
        known = ", ".join(name for name, entry in COMMANDS.items() if entry.resumable)
        raise InvalidInputError(
            f"{directory.path}/config.json names the command {origin.command!r}, whose runs can be neither resumed nor "
            f"drawn again; those of {known} can"
        )
    return command, values


def _adopt(directory: RunDirectory, command: Command, values: Mapping[str, Any]) -> None:
    """Make a run that another version began one of this version, when the change of versions has been accepted."""
    if directory.read_origin() != (command.name, __version__):
        directory.write_config(values, command.name)
