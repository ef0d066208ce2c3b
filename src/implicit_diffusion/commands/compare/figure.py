"""The picture of a comparison: what every method has captured, against the network's work and against the clock."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from implicit_diffusion.commands.compare.summary import ProblemSummary, Reached, Summary
from implicit_diffusion.commands.shared.drawing import finish_figure, sheet

COLOURS = {
    "adjoint": "#1f6f8b",
    "draft": "#e0a458",
    "alignprop": "#b5651d",
    "adjoint-matching": "#6a4c93",
    "score": "#c8553d",
    "surrogate": "#2a9d5c",
    "ddpo": "#8a8f98",
    "grpo": "#22272e",
    "guidance": "#b07aa1",
    "best-of": "#4f5d75",
}


def draw(summary: Summary, path: Path) -> None:
    """A row for each problem; left against network evaluations, right against seconds; dotted are queues."""
    figure = sheet(10.5, 3.2 * len(summary.problems) + 0.6)
    grid = figure.subplots(len(summary.problems), 2, sharey="row", squeeze=False)
    for problem, axes in zip(summary.problems, grid):
        reached = [each for each in summary.reached if each.problem == problem.name and each.curves]
        for axis, what in zip(axes, ("evaluations", "seconds")):
            for each in reached:
                _curve(axis, each, problem, what)
            axis.axhline(0, color="0.5", lw=0.8)
            axis.set(xlabel={"evaluations": "network evaluations", "seconds": "processor seconds"}[what])
        axes[0].set(title=problem.name, ylabel="share of the possible fall of J")
    entries = {label: handle for axis in grid.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=6, frameon=False)
    finish_figure(figure, path, grid.flat)


def _curve(axis: Any, each: Reached, problem: ProblemSummary, what: str) -> None:
    colour = COLOURS[each.method.removesuffix("-queue")]
    possible = problem.before.mean - problem.best.mean
    points = list(zip(*each.curves))
    shares = [mean(point.fall.mean for point in column) / possible for column in points]
    errors = [_error([point.fall.mean for point in column], column[0].fall.error) / possible for column in points]
    if each.method in ("guidance", "best-of"):
        axis.axhline(shares[-1], color=colour, ls="--", lw=1.2, label=each.method)
        axis.axhspan(shares[-1] - 2 * errors[-1], shares[-1] + 2 * errors[-1], color=colour, alpha=0.08, lw=0)
        return
    x = [mean(getattr(point, what) for point in column) for column in points]
    style = ":" if each.method.endswith("-queue") else "-"
    axis.plot([0, *x], [0, *shares], style, color=colour, label=each.method, lw=1.6)
    low, high = ([share + sign * 2 * error for share, error in zip(shares, errors)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)


def _error(values: list[float], of_noise: float) -> float:
    """The standard error over seeds, with that of the held-out noise that they share."""
    return math.hypot(stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0, of_noise)
