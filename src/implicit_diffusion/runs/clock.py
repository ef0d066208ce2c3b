"""Where the time of a run goes: seconds by named parts, which add up to the whole.

At any moment one part is running: a part that begins within another takes over until it ends, and time outside of all
parts is the rest. The seconds are kept in the folder of the run, so that those of an interrupted run and of its
resumption add up. A run may contain others, as in a sweep: time spent in the inner ones counts, part by part, in the
outer one too. Of several processes, the main one keeps its own time; nobody waits for that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from implicit_diffusion.errors import InvalidInputError, StorageError
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.files.lock import LOCK
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.processes import is_main

SECONDS_FILE = "seconds.json"
REST = "the rest"
SAVE_EVERY = 5.0  # seconds: a run that is killed loses at most that, and its last part


class Clock:
    """The seconds of one run, by parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.path: Path | None = None
        self._saved = time.monotonic()

    def keep(self, path: Path) -> None:
        """Keep the seconds in this folder from now on, and add them to those that it holds."""
        self.path = path
        for name, spent in read(path).items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def save(self) -> None:
        """Write the seconds, unless the folder holds nothing yet: a run that is refused leaves nothing."""
        self._saved = time.monotonic()
        if self.path is None or not is_main():
            return
        if any(file.name not in (LOCK, SECONDS_FILE) for file in self.path.glob("*")):
            with replacing(self.path / SECONDS_FILE) as file:
                file.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > SAVE_EVERY


_clocks: list[Clock] = []  # of the runs in progress, the outermost first
_parts: list[str] = []  # that have begun; the last one is running
_last = 0.0  # when the seconds of the running part were counted last
_begun: float | None = None  # when a command began that has not reached its run yet


def begin_command() -> None:
    """Say that a command begins: its run will count the time from here on, such as that of imports, as loading."""
    global _begun
    _begun = time.monotonic()


@contextmanager
def run() -> Iterator[Clock]:
    """A clock for the block. However the block ends, the seconds are then written to the folder of `Clock.keep`."""
    global _begun
    clock = Clock()
    _count()
    if _begun is not None:
        clock.seconds["loading"], _begun = time.monotonic() - _begun, None
    _clocks.append(clock)
    try:
        with part(REST):
            yield clock
    finally:
        _count()
        _clocks.remove(clock)
        with suppress(*[StorageError] * (sys.exception() is not None)):  # the first error is the one to see
            clock.save()


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the seconds of the block as those of a part, except the parts within it; also a decorator."""
    _count()
    _parts.append(name)
    try:
        yield
    finally:
        _count()
        _parts.pop()
        for clock in _clocks:
            if clock.is_due() and sys.exception() is None:
                clock.save()


def keep(path: Path) -> None:
    """`Clock.keep` of the run in progress, if any; called once the folder is known to be the run's own."""
    if _clocks:
        _clocks[-1].keep(path)


def seconds(path: Path) -> dict[str, float]:
    """Seconds by parts of the run in a folder, up to now if it is in progress; {} where they were not counted."""
    _count()
    return next((dict(clock.seconds) for clock in _clocks if clock.path == path), None) or read(path)


def shares(path: Path) -> list[tuple[str, float, float]]:
    """Parts with their seconds and shares, the longest first, then their sum; empty where they were not counted."""
    spent = seconds(path)
    whole = sum(spent.values())
    rows = [(name, s, s / whole) for name, s in sorted(spent.items(), key=lambda item: -item[1])] if whole else []
    return [*rows, ("all", whole, 1.0)] if rows else []


def read(path: Path) -> dict[str, float]:
    """What a clock has kept in a folder."""
    with suppress(InvalidInputError):
        kept = read_json(path / SECONDS_FILE)
        return {str(name): float(spent) for name, spent in kept.items() if isinstance(spent, int | float)}
    return {}


def in_words(spent: dict[str, float]) -> str:
    """Such as `41 s: 12 loading, 10 training, …`, the longest first; parts below half a second belong to the rest.

    Seconds are rounded so that they add up: those with the largest fractions are rounded up.
    """
    whole = sum(spent.values())
    parts = sorted(((s, name) for name, s in spent.items() if s >= 0.5 and name != REST), reverse=True)
    parts.append((max(0.0, whole - sum(s for s, _ in parts)), REST))
    up = sorted(parts, key=lambda part: int(part[0]) - part[0])[: round(whole) - sum(int(s) for s, _ in parts)]
    rounded = [(int(part[0]) + (part in up), part[1]) for part in parts]
    words = ", ".join(f"{s} {name}" for s, name in rounded if s)
    return f"{whole:.0f} s: {words}" if words else f"{whole:.0f} s"


def _count() -> None:
    """Count the time since the last call for the part that was running."""
    global _last
    now = time.monotonic()
    if _parts:
        for clock in _clocks:
            clock.seconds[_parts[-1]] = clock.seconds.get(_parts[-1], 0.0) + now - _last
    _last = now
