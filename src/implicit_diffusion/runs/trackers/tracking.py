"""The numbers and pictures of a run, in the order of its updates, to all trackers that it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from implicit_diffusion.showing import Shown

Pixels = UInt8[np.ndarray, "height width 3"]
STEPS = ("updates", "iteration")  # columns that say when a line was written
GROUPS = ("arm", "lr", "kl_weight", "seed")  # columns that say which of several trainings a line is of
CURVE = "curve"  # a column with lines of its own


@runtime_checkable
class Tracker(Protocol):
    """Where numbers and pictures go."""

    def scalars(self, step: int, group: str, numbers: Mapping[str, float]) -> None:
        """Show the numbers after an update.

        Args:
            step: number of updates.
            group: which of several trainings these are of; "" where there is one.
            numbers: by name.
        """

    def images(self, step: int, group: str, name: str, pixels: Pixels) -> None:
        """Show a picture after an update; steps of one group never decrease, over numbers and pictures together."""

    def rewind(self, step: int) -> None:
        """Forget what was shown after `step`, which is shown again; with 0, all of it."""

    def flush(self) -> None:
        """Hand over what was shown so far, so that it outlives this process."""

    def close(self) -> None:
        """Flush and end; it opens again where more is shown."""


class Tracking(Shown):
    """What the trackers of a run get. Nothing is written to them except by `lines`, `rewind` and `close`.

    Args:
        trackers: none for a run that is not tracked, and in all processes of a run but the main one.
        wanted: whether the run is tracked, so that pictures are to be drawn; by default whether there are trackers.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), wanted: bool | None = None) -> None:
        self.trackers = tuple(trackers)
        self.wanted = bool(trackers) if wanted is None else wanted
        self._waiting: list[tuple[int, str, str, Pixels]] = []

    def _words(self) -> tuple[str, ...]:
        return tuple(type(tracker).__name__ for tracker in self.trackers)

    def picture(self, step: int, name: str, pixels: Pixels, group: str = "") -> None:
        """Show a picture, once the line of its update is written: some trackers take steps in their order only.

        A picture of one of several trainings follows the lines of that training, and does not wait.
        """
        if self.trackers:
            self._waiting.append((step, group, name, pixels))
        if group or step == 0:
            self.lines(())

    def lines(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show lines of metrics.jsonl, which are in the file, and the pictures up to them.

        Args:
            rows: as JSON has them.
        """
        if not self.trackers:
            return
        if not rows:
            self._show_pictures(math.inf)
        for step, group, numbers in (one for row in rows for one in series(row)):
            self._show_pictures(step)
            for tracker in self.trackers:
                tracker.scalars(step, group, numbers)
        for tracker in self.trackers:
            tracker.flush()

    def rewind(self, step: int) -> None:
        """The run continues from its checkpoint of this update."""
        self._waiting.clear()
        for tracker in self.trackers:
            tracker.rewind(step)

    def close(self) -> None:
        """Show the pictures that wait, and end."""
        self._show_pictures(math.inf)
        for tracker in self.trackers:
            tracker.close()

    def _show_pictures(self, step: float | int) -> None:
        while self._waiting and self._waiting[0][0] <= step:
            shown = self._waiting.pop(0)
            for tracker in self.trackers:
                tracker.images(*shown)


UNTRACKED = Tracking()


def series(row: Mapping[str, Any]) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Step, group and numbers of a line of metrics.jsonl; several of a line that holds a whole curve."""
    group = group_of(row)
    for line in row.get(CURVE) or [row]:
        step = next((int(line[name]) for name in STEPS if name in line), 0)
        left = {name: value for name, value in line.items() if name not in (*STEPS, *(GROUPS if group else ()))}
        numbers = {name: float(value) for name, value in left.items() if type(value) in (int, float)}
        yield step, group, numbers


def group_of(row: Mapping[str, Any]) -> str:
    """The training, among several, that a line is of, such as "weighted seed 0"; "" where there is one."""
    names = [name for name in GROUPS if name in row] if "arm" in row else []
    return " ".join(str(row[name]) if name == "arm" else f"{name} {row[name]}" for name in names)
