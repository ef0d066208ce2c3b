"""The registry of commands: for each its options, what runs it, and what draws a finished run of it again.

The command line, `resume` and `report`, and the tests of all commands read it. An entry says where things are, and
imports them when they are asked for: starting a command costs its own modules only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from implicit_diffusion.runs.directory import RunDirectory


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: as it is typed, and as config.json has it.
        config_place: where the dataclass of its options is, as "module:name" below `implicit_diffusion.commands`.
        run_place: where the function is that runs it.
        report_place: where the function is that makes again what is derived from a finished run; None for a command
            that leaves no folder to resume.
        last_file: the last of the files that a run writes; with it, a run is finished.
        course_place: where the function is that reads the numbers of its runs, finished or not, for `report`.
    """

    name: str
    config_place: str
    run_place: str
    report_place: str | None = None
    last_file: str | None = None
    course_place: str | None = None

    @property
    def config(self) -> type:
        """The dataclass of its options."""
        loaded: type = _load(self.config_place)
        return loaded

    @property
    def resumable(self) -> bool:
        """Whether it leaves a folder that `resume` and `report` know."""
        return self.report_place is not None

    def run(self, config: Any, directory: RunDirectory | None = None) -> Any:
        """Run it; returns its result, the summary for most.

        Args:
            config: its options, of the type `config`.
            directory: of an interrupted run to continue; None begins a new one.
        """
        run = _load(self.run_place)
        return run(config) if directory is None else run(config, directory)

    def course(self, files: Any) -> Any:
        """The numbers of a run so far, as `report` shows and compares them."""
        assert self.course_place is not None
        return _load(self.course_place)(files)

    def report(self, directory: RunDirectory) -> dict[str, Any]:
        """Make again what is derived from a finished run, from what is in its folder; returns the summary."""
        assert self.report_place is not None
        summary: dict[str, Any] = _load(self.report_place)(directory)
        return summary


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"implicit_diffusion.commands.{module}"), name)


def _trains(name: str, last_file: str) -> Command:
    """A command that trains, in whose folder everything has the same name as in those of the others."""
    places = f"{name}.config:Config", f"{name}.command:run", f"{name}.command:report"
    return Command(name, *places, last_file, f"reporting.courses:{name}")


COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        _trains("finetune", "report.html"),
        Command("resume", "resuming:Resume", "resuming:run_resume"),
        Command("report", "reporting.command:Report", "reporting.command:run"),
        Command("sweep", "sweep.config:Config", "sweep.command:run"),
        Command("sample", "sample.config:Config", "sample.command:run"),
        _trains("pretrain", "summary.json"),
        _trains("ebm", "report.html"),
        Command("score", "score.config:Config", "score.command:run"),
        _trains("tilt", "summary.json"),
        _trains("hexagon", "summary.json"),
        _trains("recovery", "summary.json"),
        _trains("compare", "report.html"),
        _trains("theory", "summary.json"),
    )
}


class Configurations(Mapping[str, type]):
    """The options of every command by its name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> type:
        return COMMANDS[name].config

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS


CONFIGURATIONS = Configurations()
