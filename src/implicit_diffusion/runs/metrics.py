"""Bringing metrics.jsonl back to the state of a checkpoint: damage is reported, and repaired where possible."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs.directory import RunDirectory


@main_only
def restore_metrics(directory: RunDirectory, updates: int, lines: int | None) -> list[dict[str, Any]]:
    """Drop the lines after `updates`, which the run makes again; leave one line for every update, in order.

    Args:
        directory: of the run.
        updates: number of updates made when the checkpoint was taken.
        lines: number of lines that were written by then; None where the checkpoint does not say.

    Returns:
        The contents of the lines. If any are missing, doubled, out of order or not readable, that is printed.
    """
    path = directory.path / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    read = [(line, _read(line)) for line in text.split("\n")[:-1]]  # the last one may have been cut by a kill
    early = [(line, row) for line, row in read if row is not None and row["updates"] <= updates]
    order = [row["updates"] for _, row in early]
    kept = {row["updates"]: (line, row) for line, row in early}
    wrong = []
    if bad := sum(row is None for _, row in read):
        wrong.append(f"{bad} of its lines cannot be read")
    if doubled := sorted(number for number, times in Counter(order).items() if times > 1):
        wrong.append(f"it held {_spans(doubled)} more than once")
    if any(second < first for first, second in itertools.pairwise(order)):
        wrong.append("it was out of order")
    if lines is not None and len(kept) < lines:
        wrong.append(f"it lacks {lines - len(kept)} of {lines} lines, among {_spans(_absent(kept, updates))}")
    if wrong:
        print(f"metrics   {path}: {'; '.join(wrong)}; the run continues, and its curves show what is left")
    with replacing(path) as file:
        file.write_text("".join(kept[number][0] + "\n" for number in sorted(kept)), encoding="utf-8")
    directory.tracking.rewind(updates)
    return [kept[number][1] for number in sorted(kept)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read now; its run may be writing to it meanwhile."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [row for row in map(_parsed, text.split("\n")[:-1]) if row is not None]


def _absent(kept: dict[int, Any], updates: int) -> list[int]:
    return [number for number in range(1, updates + 1) if number not in kept]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read(line: str) -> dict[str, Any] | None:
    row = _parsed(line)
    return row if row is not None and type(row.get("updates")) is int else None


def _spans(numbers: list[int]) -> str:
    """Numbers in words, such as `updates 3, 5 to 8`."""
    firsts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    lasts = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    spans = [str(a) if a == b else f"{a} to {b}" for a, b in zip(firsts, lasts)]
    return f"update{'s' * (len(numbers) > 1)} {', '.join(spans[:5])}{', …' if len(spans) > 5 else ''}"
