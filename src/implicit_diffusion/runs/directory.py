"""The folder of one run: what was asked, what happened, what came out.

    plan.json       what each KL weight can buy, known before the run, and plan/, the rewards that it is made of
    config.json     the command, the version of this library, and all options with their values
    metrics.jsonl   one line per update
    summary.json    the headline numbers
    figures/        pictures
    model/          the result
    judged/         what the report is made of, beside the JSON files
    report.html     all of it, for people
    checkpoint/     the newest states to continue from, as checkpoint/000120 of update 120
    seconds.json    where the time went
    kept/           models of earlier updates that a run may end with; tensorboard/, wandb/: see `runs.trackers`
    so-far.html     how far an unfinished run had come, for people; no run reads it

The states in checkpoint/, plan/, judged/ and kept/ have manifests, by which a bit that has flipped is noticed
(`files.manifest`). Whatever writes to the folder holds it meanwhile (`RunDirectory.held`): one run at a time. Where
several processes compute a run together, all of them call a method, and the main one reads or writes. summary.json says
that a run is judged; what comes after it is derived from what is on disk, and can be made again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from implicit_diffusion import __version__
from implicit_diffusion.errors import NOT_OF_THE_RUN, InvalidInputError, check_path
from implicit_diffusion.files.atomic import UNFINISHED, append, check_place, replacing, writing
from implicit_diffusion.files.checkpoints import Checkpoint, Checkpoints
from implicit_diffusion.files.lock import LOCK, hold, make
from implicit_diffusion.files.manifest import MANIFEST
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.processes import from_main, main_only
from implicit_diffusion.runs import clock, records
from implicit_diffusion.runs.console import Say, say_on_stderr
from implicit_diffusion.runs.devices import naming_memory
from implicit_diffusion.runs.trackers.tracking import UNTRACKED, Tracking
from implicit_diffusion.showing import Shown

BEGUN = "begun"  # key of config.json: when the run began, in UTC, which tells it from every other run


class Origin(NamedTuple):
    """What began a run: its command, and the version of this library."""

    command: str
    version: str


@dataclass(frozen=True, repr=False, init=False)
class RunDirectory(Shown):
    """The paths and files of one run; `RunDirectory(path)` opens an existing one, `create` begins a new one.

    Args:
        path: a string or a path; kept as a `Path`.
        tracking: gets the lines of metrics.jsonl as well (`runs.trackers`).

    Raises:
        InvalidInputError: `path` is neither.
    """

    path: Path
    tracking: Tracking = field(compare=False, repr=False)

    def __init__(self, path: str | PathLike[str], tracking: Tracking = UNTRACKED) -> None:
        object.__setattr__(self, "path", check_path("the folder of a run", path))
        object.__setattr__(self, "tracking", tracking)

    @classmethod
    def create(cls, path: str | PathLike[str], may_hold: Collection[str] = ()) -> RunDirectory:
        """Make the folder, with its parents. Arguments and errors as in `check`."""
        cls.check(path, may_hold)
        directory = cls(path)
        from_main(lambda: make(directory.path))
        return directory

    @staticmethod
    @main_only
    def check(path: str | PathLike[str], may_hold: Collection[str] = ()) -> None:
        """Refuse a folder that `create` would refuse, without making it: a run that is refused later leaves nothing.

        Args:
            path: of the folder.
            may_hold: files, relative to the folder, that may be there and will be overwritten. Unfinished ones of these
                names, and of those that a run begins with, may be there in any case.

        Raises:
            InvalidInputError: `path` is a file, lies below a file, is a folder with something in it, or lies where
                nothing can be written.
        """
        path = check_path("path", path)
        allowed = {*may_hold, LOCK, clock.SECONDS_FILE}
        try:
            if path.exists() and not path.is_dir():
                raise InvalidInputError(f"`path` {path} is a file; name a new folder")
            files = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
            unfinished = {f"{name}{UNFINISHED}" for name in (*may_hold, "config.json")}
            if any(f not in allowed | unfinished and not fnmatch(f, f"checkpoint/*{UNFINISHED}/*") for f in files):
                holds, there = "exists and is not empty", RunDirectory(path)
                reported = "report.html" in files or f"judged/{MANIFEST}" not in files
                if "config.json" in files and there.has_state:
                    holds += f": a run that {there.resume_command} continues, unless it is finished"
                    if not ("summary.json" in files and reported):  # as far as can be told without its command
                        holds = f"holds a run that was interrupted: continue with {there.resume_command}"
                raise InvalidInputError(f"`path` {path} {holds}; choose another `path`, or move it away")
        except OSError as error:  # such as a name that is too long
            raise InvalidInputError(f"`path` {path} cannot be made ({error}); name a folder elsewhere") from error
        check_place(path)

    @contextmanager
    def held(self) -> Iterator[RunDirectory]:
        """Hold the folder for the block, which makes it; `files.lock.hold` says how, and what it raises."""
        with hold(self.path):
            yield self

    def check_start(self, command: str, may_hold: Collection[str] = ()) -> None:
        """Refuse a folder that holds more than the little that a run of this command leaves when it ends early.

        Args:
            command: that is about to begin a run here.
            may_hold: as in `check`.

        Raises:
            InvalidInputError: as in `check`.
        """
        origin = self.read_origin()
        ours = origin is not None and origin.command == command
        self.check(self.path, (*may_hold, "provenance.json", *(["config.json"] if ours else [])))

    @main_only
    def start(self, command: str, config: Any, may_hold: Collection[str] = ()) -> None:
        """Write config.json into a new folder, or into what is left of the same run, which begins anew.

        Args:
            command: that begins the run.
            config: a dataclass, as in `write_config`.
            may_hold: as in `check`.

        Raises:
            InvalidInputError: as in `check`; a folder with the rest of another run, or with a run that can be resumed.
        """
        if (self.path / "summary.json").exists() or self.has_state or self.read_config() != records.as_json(config):
            self.check_start(command, may_hold)
        with writing(self.path):
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        self.write_config(config, command)

    @main_only
    def write_config(self, config: Any, command: str | None = None) -> None:
        """Write config.json: the command that begins the run, the version of this library, and the options.

        Args:
            config: the options, a dataclass or a mapping.
            command: its name; None where no command began the run, which then cannot be resumed by its folder alone.

        Raises:
            NonFiniteError: a value is NaN or infinite.
            InvalidInputError: a value has no JSON form.
        """
        origin: dict[str, Any] = {}
        if command is not None:
            begun = self.identity if self.identity.get("command") == command else {}
            origin = Origin(command, __version__)._asdict() | {BEGUN: begun.get(BEGUN) or datetime.now(UTC).isoformat()}
        records.write(self.path / "config.json", origin | records.as_json(config))

    @main_only
    def read_config(self) -> dict[str, Any] | None:
        """The options in config.json; None where there is no file, or none that can be read."""
        values = records.read(self.path / "config.json")
        return None if values is None else {k: values[k] for k in values if k not in (*Origin._fields, BEGUN)}

    @main_only
    def read_origin(self) -> Origin | None:
        """What began the run, by config.json; None where it does not say."""
        values = records.read(self.path / "config.json") or {}
        origin = [values.get(name) for name in Origin._fields]
        return Origin(*map(str, origin)) if all(isinstance(part, str) for part in origin) else None

    @property
    def identity(self) -> dict[str, str]:
        """What tells its states from those of other runs: its command, and when it began, as far as known."""
        values = records.read(self.path / "config.json") or {}
        return {name: values[name] for name in ("command", BEGUN) if isinstance(values.get(name), str)}

    @property
    @main_only
    def has_state(self) -> bool:
        """Whether there is a state to continue from, which may be damaged."""
        return bool(self.checkpoints.numbers())

    @property
    def resume_command(self) -> str:
        """The command that continues the run, in backquotes."""
        return f"`implicit-diffusion resume {shlex.quote(str(self.path))}`"

    @property
    def model(self) -> Path:
        """Where the resulting model goes; not made here."""
        return self.path / "model"

    @property
    def checkpoint(self) -> Path:
        """The folder of the states to continue from; not made here."""
        return self.path / "checkpoint"

    @property
    def checkpoints(self) -> Checkpoints:
        """The states to continue from."""
        return Checkpoints(self.checkpoint, self.identity)

    @property
    def remains(self) -> str:
        """Where the last good state is, for the end of a message; "" where there is none."""
        numbers = self.checkpoints.numbers()
        return f"; the last good state is in {self.checkpoints.path(numbers[0])}" if numbers else ""

    def read_checkpoint(self, say: Say = say_on_stderr) -> Checkpoint:
        """The newest state that is as it was written, with its number; arguments and errors as in `newest`."""
        return self.checkpoints.newest(say)

    def save_part(self, name: str, state: Any) -> None:
        """Write a state of this run into its folder `name`; errors as in `save_state`."""
        save_state(self.path / name, state, self.identity)

    def load_part(self, name: str) -> Any:
        """Read what `save_part` wrote; errors as in `load_state`, also for a state of another run."""
        return load_state(self.path / name, self.identity)

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Add the command that continues the run to an error that is not the run's own, once config.json is there."""
        command = self.resume_command
        try:
            with naming_memory():
                yield
            self.check_there()
        except KeyboardInterrupt as error:
            if not (self.path / "config.json").exists():
                raise
            raise KeyboardInterrupt(f"{str(error) or 'interrupted'}; continue with {command}") from error
        except NOT_OF_THE_RUN as error:
            if command in str(error) or not (self.path / "config.json").exists():
                raise
            remains = "" if self.remains in str(error) else self.remains
            raise type(error)(f"{error}{remains}; then {command} continues the run") from error

    @main_only
    def check_there(self) -> None:
        """Raise `StorageError` where the folder of a run that has begun, or its config.json, has vanished."""
        with writing(path := self.path / "config.json"):
            path.stat()

    @main_only
    def figure(self, name: str) -> Path:
        """The path figures/`name`.png, in a folder that exists."""
        folder = self.path / "figures"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"

    def write_summary(self, summary: Any) -> None:
        """Write summary.json; values and errors as in `write_config`."""
        records.write(self.path / "summary.json", summary)

    @main_only
    def append_metrics(self, *metrics: Mapping[str, Any]) -> None:
        """Append a line for each to metrics.jsonl; they are on the disk when this returns. Errors as in `write_config`.

        Values that are still on a device are read in one go.
        """
        rows: list[dict[str, Any]] = []
        try:
            rows += map(records.as_json, records.read_back(metrics))
        finally:  # what is refused leaves no trace, what came before it is kept
            append(self.path / "metrics.jsonl", "".join(map(records.as_line, rows)))
            if rows:
                self.tracking.lines(rows)

    @main_only
    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, except a last one that was cut short when the process was killed."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    @main_only
    def forget_metrics(self, updates: int) -> None:
        """Drop the lines of updates after `updates`, which a run that is restored there makes again."""
        kept = [line for line in self.read_metrics() if line["updates"] <= updates]
        with replacing(self.path / "metrics.jsonl") as file:
            file.write_text("".join(map(records.as_line, kept)), encoding="utf-8")
