"""The course of a run, whether it is finished or not, from what is in its folder; nothing is written there.

A run may be writing meanwhile. metrics.jsonl grows by whole lines, of which the last one may be cut; all other files
are replaced in one step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import mean, stdev
from typing import Any, NamedTuple

from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.directory import Origin
from implicit_diffusion.runs.metrics import read_lines
from implicit_diffusion.showing import Shown

TAIL = 10  # the last tenth of a training among several is what its number is the mean of


class Number(NamedTuple):
    """A headline number with its standard error; None where that is not known."""

    value: float
    error: float | None = None


class Panel(NamedTuple):
    """One diagram of a course.

    Args:
        name: the column of metrics.jsonl; "" where there are evaluations only.
        label: of the y axis, with its unit.
        looks: the column of evaluations on the way, whose standard errors are in `…_se` where they are known.
        looks_are: what these are, in words.
        log: whether the y axis is logarithmic.
        x: the column of the x axis, and its label.
    """

    name: str
    label: str
    looks: str = ""
    looks_are: str = ""
    log: bool = False
    x: tuple[str, str] = ("updates", "updates")


class FrontierRow(NamedTuple):
    """What the plan of a fine-tuning run says of one KL weight: the optimum."""

    kl_weight: float
    path_kl: Number
    reward: Number


@dataclass(frozen=True)
class Frontier:
    """Reward against path KL.

    Args:
        optima: of the plan, from small to large path KL.
        pretrained: mean reward of the pretrained model.
        way: path KL and mean reward on the way of the training.
        end: path KL and mean reward at the end; None for an unfinished run.
    """

    optima: list[FrontierRow]
    pretrained: Number
    way: list[tuple[Number, Number]]
    end: tuple[Number, Number] | None


@dataclass(frozen=True, repr=False)
class Course(Shown):
    """What there is to see of a run.

    Args:
        kind: what it is a run of; only runs of one kind can be compared.
        panels: the diagrams.
        lines: rows of numbers, several trainings among them where they have an `arm`.
        numbers: the headline numbers, by what they are.
        defining: options that decide what the numbers are numbers of.
        total: number of updates asked for, where a run has one training.
        frontier: where there is one.
        note: what to know of the numbers of a finished run.
        so_far: likewise of an unfinished one.
    """

    kind: str
    panels: tuple[Panel, ...]
    lines: Sequence[Mapping[str, Any]]
    numbers: dict[str, Number]
    defining: tuple[str, ...] = ()
    total: int | None = None
    frontier: Frontier | None = None
    note: str = ""
    so_far: str = ""


@dataclass(frozen=True, repr=False)
class Files(Shown):
    """The files of a run that a course is made of, read once.

    Args:
        directory: of the run.
        origin: its command and version.
        options: config.json.
        lines: metrics.jsonl.
        summary: summary.json; None for an unfinished run.
        plan: plan.json; None where there is none.
        written: when the last line was written, in UTC; None before the first one.
    """

    directory: RunDirectory
    origin: Origin
    options: Mapping[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None
    plan: dict[str, Any] | None
    written: datetime | None = field(default=None)

    @staticmethod
    def read(directory: RunDirectory, origin: Origin, options: Mapping[str, Any]) -> Files:
        """What is there now."""
        path = directory.path / "metrics.jsonl"
        lines, written = read_lines(path), None
        with suppress(OSError):
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC) if lines else None
        summary, plan = (_read_object(directory, name) for name in ("summary.json", "plan.json"))
        return Files(directory, origin, options, lines, summary, plan, written)

    @property
    def finished(self) -> bool:
        """Whether the run is judged."""
        return self.summary is not None

    def ended(self, names: Mapping[str, str]) -> dict[str, Number]:
        """Numbers of the summary, by label, from their keys; those that are not there are left out."""
        return _numbers(self.summary or {}, names)

    def latest(self, names: Mapping[str, str]) -> dict[str, Number]:
        """Likewise the last ones of metrics.jsonl."""
        last: dict[str, Any] = {}
        for line in self.lines:
            last |= {name: value for name, value in line.items() if value is not None}
        return _numbers(last, names)


def _read_object(directory: RunDirectory, name: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((directory.path / name).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


def as_number(value: object) -> float | None:
    """A finite number of a file of JSON; None for anything else."""
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _numbers(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Number]:
    values = {label: (as_number(content.get(key)), as_number(content.get(f"{key}_se"))) for label, key in names.items()}
    return {label: Number(value, error) for label, (value, error) in values.items() if value is not None}


def columns(lines: Iterable[Mapping[str, Any]], *names: str) -> list[tuple[float, ...]]:
    """Rows of numbers, from the lines that have all of them."""
    rows = (tuple(as_number(line.get(name)) for name in names) for line in lines)
    return [tuple(v for v in row if v is not None) for row in rows if None not in row]


def trainings(lines: Sequence[Mapping[str, Any]], *names: str) -> dict[tuple[Any, ...], list[list[Mapping[str, Any]]]]:
    """Lines by the values of these columns, such as arm and KL weight, and then by seed."""
    groups: dict[tuple[Any, ...], dict[Any, list[Mapping[str, Any]]]] = {}
    for line in lines:
        key, seed = tuple(line.get(name) for name in names), line.get("seed")
        if all(isinstance(value, str | int | float) for value in (*key, seed)):
            groups.setdefault(key, {}).setdefault(seed, []).append(line)
    return {key: list(seeds.values()) for key, seeds in groups.items()}


def over_seeds(runs: Sequence[Sequence[Mapping[str, Any]]], name: str) -> Number | None:
    """Mean over trainings of the last tenth of a column, with its standard error over them."""
    ends = [columns(run, name) for run in runs]
    values = [mean(value for (value,) in rows[-max(1, len(rows) // TAIL) :]) for rows in ends if rows]
    if not values:
        return None
    return Number(mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)
