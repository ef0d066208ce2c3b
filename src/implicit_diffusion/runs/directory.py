"""The folder of one run: what was asked, what happened, what came out.

    plan.json       what could be had, known before the run, and plan/, the rewards that it is made of
    config.json     the resolved configuration
    metrics.jsonl   one line per update
    summary.json    the headline numbers
    figures/        pictures
    model/          the result
    judged/         what the report is made of, beside the JSON files
    report.html     all of it, for people
    checkpoint/     the state to continue from
    seconds.json    where the time went
    kept/           models of earlier updates that a run may end with

Whatever writes to the folder holds it meanwhile (`RunDirectory.held`): one process at a time. summary.json is the mark
that a run is judged; what comes after it is derived from what is on disk, and can be made again.

JSON is strict: NaN and infinity, which JSON does not have, are refused instead of written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from implicit_diffusion.errors import (
    InvalidInputError,
    MemoryLimitError,
    NonFiniteError,
    RewardError,
    StorageError,
    check_path,
)
from implicit_diffusion.files.atomic import UNFINISHED, check_place, replacing, writing
from implicit_diffusion.files.lock import LOCK, hold, make
from implicit_diffusion.files.states import FILE
from implicit_diffusion.runs import clock
from implicit_diffusion.runs.devices import naming_memory
from implicit_diffusion.showing import Shown

BEGUN = ("config.json", f"checkpoint/{FILE}")  # written before the first update


@dataclass(frozen=True, repr=False, init=False)
class RunDirectory(Shown):
    """The paths and files of one run; `RunDirectory(path)` opens an existing one, `create` begins a new one.

    Args:
        path: a string or a path; kept as a `Path`.

    Raises:
        InvalidInputError: neither.
    """

    path: Path

    def __init__(self, path: str | PathLike[str]) -> None:
        object.__setattr__(self, "path", check_path("the folder of a run", path))

    @classmethod
    def create(cls, path: str | PathLike[str], may_hold: Collection[str] = ()) -> RunDirectory:
        """Make the folder, with its parents. Arguments and errors as in `check`."""
        cls.check(path, may_hold)
        directory = cls(check_path("--out", path))
        make(directory.path)
        return directory

    @staticmethod
    def check(path: str | PathLike[str], may_hold: Collection[str] = ()) -> None:
        """Refuse a folder that `create` would refuse, without making it: a run that is refused later leaves nothing.

        Args:
            path: of the folder.
            may_hold: files, relative to the folder, that may be there and will be overwritten; half-written ones of
                these names, and of those that a run begins with, may be there in any case.

        Raises:
            InvalidInputError: `path` is a file, below a file, a folder with something in it, or where nothing can be
                written.
        """
        path = check_path("--out", path)
        left_over = {LOCK, clock.FILE, *(name + UNFINISHED for name in (*may_hold, *BEGUN))}
        try:
            if path.exists() and not path.is_dir():
                raise InvalidInputError(f"--out {path} is a file; name a new folder")
            files = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
            if not files <= {*may_hold, *left_over}:
                held = "exists and is not empty"
                judged, reported = "summary.json" in files, "report.html" in files or f"judged/{FILE}" not in files
                if files.issuperset(BEGUN) and not (judged and reported):
                    held = f"holds a run that was interrupted: go on with {RunDirectory(path).resume_command}"
                raise InvalidInputError(f"--out {path} {held}; choose another --out, or move it away")
        except OSError as error:  # such as a name that is too long
            raise InvalidInputError(f"--out: {path} cannot be made ({error}); name a folder elsewhere") from error
        check_place(path)

    @contextmanager
    def held(self) -> Iterator[RunDirectory]:
        """Hold the folder for the block, which makes it; `runs.lock.hold` says how, and what it raises."""
        with hold(self.path):
            yield self

    def check_start(self, kind: Any, may_hold: Collection[str] = ()) -> None:
        """Refuse a folder that holds more than the little that an early end of a run of this kind leaves.

        Args:
            kind: the dataclass of the run's config, or such a config.
            may_hold: as in `check`.

        Raises:
            InvalidInputError: as `check`.
        """
        ours = (self.read_config() or {}).keys() == {field.name for field in dataclasses.fields(kind)}
        self.check(self.path, (*may_hold, "provenance.json", *(["config.json"] if ours else [])))

    def start(self, config: Any, may_hold: Collection[str] = ()) -> None:
        """Write config.json into a new folder, or into what is left of the very same run, which begins anew.

        Args:
            config: a dataclass, as in `write_config`.
            may_hold: as in `check`.

        Raises:
            InvalidInputError: as `check`; a folder with the rest of another run, or with a run that can be resumed.
        """
        if (self.path / "summary.json").exists() or self.has_state or self.read_config() != plain(config):
            self.check_start(config, may_hold)
        with writing(self.path):
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        self.write_config(config)

    def read_config(self) -> dict[str, Any] | None:
        """What `write_config` wrote; None where there is nothing, or nothing that can be read."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else None
        return None

    @property
    def has_state(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.checkpoint / FILE).is_file()

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run, in the quotes that a message has around it."""
        return f"`implicit-diffusion resume {shlex.quote(str(self.path))}`"

    @property
    def model(self) -> Path:
        """Where the resulting model goes; not made here."""
        return self.path / "model"

    @property
    def checkpoint(self) -> Path:
        """Where `save_state` puts the state to continue from; not made here."""
        return self.path / "checkpoint"

    @property
    def kept(self) -> Path:
        """Where models of earlier updates are kept (`runs.kept`); not made here."""
        return self.path / "kept"

    @property
    def unconfirmed(self) -> Path:
        """Where a state waits that may turn out to be unsound; not made here."""
        return self.checkpoint / "next"

    def confirm(self) -> None:
        """Let the state that waits replace the one in `checkpoint`, in one step."""
        with writing(self.checkpoint / FILE):
            (self.unconfirmed / FILE).replace(self.checkpoint / FILE)

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Tell whom something keeps from finishing the block how to go on, as soon as there is a config to begin from.

        What is told so is an interruption, a file that cannot be written, memory that is used up, a reward that raises.
        """
        command = self.resume_command
        try:
            with naming_memory():
                yield
        except KeyboardInterrupt as error:
            if not (self.path / "config.json").exists():
                raise
            raise KeyboardInterrupt(f"{str(error) or 'interrupted'}; go on with {command}") from error
        except (StorageError, MemoryLimitError, RewardError) as error:
            if command in str(error) or not (self.path / "config.json").exists():
                raise
            raise type(error)(f"{error}; then {command} goes on") from error

    def figure(self, name: str) -> Path:
        """The path figures/`name`.png, in a folder that exists."""
        folder = self.path / "figures"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"

    def write_config(self, config: Any) -> None:
        """Write config.json from a dataclass or a mapping.

        Raises:
            NonFiniteError: a value is NaN or infinite.
            InvalidInputError: a value has no JSON form.
        """
        self._write("config.json", config)

    def write_summary(self, summary: Any) -> None:
        """Write summary.json; values and errors as in `write_config`."""
        self._write("summary.json", summary)

    def write_plan(self, plan: Any) -> None:
        """Write plan.json; values and errors as in `write_config`."""
        self._write("plan.json", plan)

    def append_metrics(self, *metrics: Mapping[str, Any]) -> None:
        """Append a line for each to metrics.jsonl; they are in the file when this returns. Errors as in `write_config`.

        What is still on a device is read in one go.
        """
        lines: list[str] = []
        try:
            lines += map(_line, _read_back(metrics))
        finally:  # what is refused leaves no trace, what came before it is kept
            if lines:
                path = self.path / "metrics.jsonl"
                with writing(path), path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a last one that was cut short when the process was killed."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def forget_metrics(self, updates: int) -> None:
        """Drop the lines of later updates than `updates`, which a run restored there will make again."""
        kept = [line for line in self.read_metrics() if line["updates"] <= updates]
        with replacing(self.path / "metrics.jsonl") as file:
            file.write_text("".join(map(_line, kept)), encoding="utf-8")

    def _write(self, name: str, value: Any) -> None:
        text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
        with replacing(self.path / name) as file:
            file.write_text(text + "\n", encoding="utf-8")


def dated(name: str) -> Path:
    """Where a run goes that nobody named: runs/`name`-<UTC time>."""
    return Path(f"runs/{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}")


def _read_back(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, with numbers for what is on a device, in one copy: each would wait for the device."""
    waiting = [value for row in rows for value in row.values() if _is_away(value)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else ())
    for row in rows:
        yield {name: next(numbers) if _is_away(value) else value for name, value in row.items()}


def _is_away(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point() and value.device.type != "cpu"


def _line(metrics: Mapping[str, Any]) -> str:
    return json.dumps(plain(metrics), ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any, key: str = "") -> Any:
    """`value` in the terms of JSON: dataclasses and mappings to dicts, tensors and arrays to numbers, paths to strings.

    Args:
        value: anything made of the above, sequences, strings, numbers, booleans and None.
        key: its name in error messages.

    Raises:
        NonFiniteError: NaN or infinity inside; the message names its key.
        InvalidInputError: something else inside.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"{key or 'value'} is {value}, which is not written to a file")
    if isinstance(value, str | Path):
        text = str(value)
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # half a letter: how Python reads what is not UTF-8
            raise InvalidInputError(f"{key or 'value'} is {text!a}, which is not UTF-8")
        return text
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InvalidInputError(f"{key or 'value'} is a {type(value).__name__}, which JSON cannot hold")
