"""The diagrams of courses: of one run, or of several on the same axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from implicit_diffusion.commands.reporting.course import Course, Frontier, Number, Panel, columns, trainings
from implicit_diffusion.commands.shared.drawing import INK, STYLE, in_legend, legend_above, save, sheet, smooth
from implicit_diffusion.commands.shared.page import Picture
from implicit_diffusion.extras import require
from implicit_diffusion.runs.callbacks.held_out import error_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which are told apart with any kind of colour vision, except their yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7d838c", "#22272e")
DASHES = ("-", "--", ":")
MOST = len(COLOURS) * len(DASHES)  # curves that look different
WIDTH = 5.0  # inches
NOISY = 12  # lines of a training from which on a running mean is drawn

Lines = Sequence[Mapping[str, Any]]
Limits = list[float]


def draw_courses(courses: Mapping[str, Course], folder: Path) -> list[Picture]:
    """Draw what the courses have numbers for.

    Args:
        courses: of one kind, by the names that stand in legends.
        folder: for the files, which exist as long as it does.

    Returns:
        The frontier, if there is one, and a picture for every panel that has lines.
    """
    require("matplotlib")
    import matplotlib

    named = {in_legend(name): course for name, course in courses.items()}
    panels = next(iter(named.values())).panels
    drawings: list[tuple[str, Callable[[], Figure | None], str, str]] = [
        ("frontier", partial(draw_frontier, named), "Reward against path KL", FRONTIER)
    ]
    for number, panel in enumerate(panels):
        title = panel.label[:1].upper() + panel.label[1:]
        if panel.x[0] != "updates":
            title += f", against {panel.x[1]}"
        drawings.append((f"panel-{number}", partial(draw_panel, panel, named), title, _caption(panel, named)))
    pictures = []
    for name, draw, title, caption in drawings:
        with matplotlib.rc_context(STYLE):
            figure = draw()
            if figure is not None:
                path = folder / f"{name}.png"
                save(figure, path)
                pictures.append(Picture(name, path, title, caption))
    return pictures


FRONTIER = (
    "Path KL and mean reward, each on noise of its own, with two standard errors. Open circles are the optima of the "
    "KL weights in a plan; small points the way of a training on held-out noise; diamonds the judgement at its end."
)


def _caption(panel: Panel, courses: Mapping[str, Course]) -> str:
    """What lines, bands and points are."""
    if any("arm" in line for course in courses.values() for line in course.lines):
        return "" if panel.x[0] == "kl" else "Means over the seeds so far; bands from the smallest to the largest."
    lines = "Thin lines are single updates, thick ones running means." if panel.name else ""
    points = f"Points: {panel.looks_are.removesuffix('.')}." if panel.looks else ""
    return " ".join(filter(None, (lines, points)))


def draw_panel(panel: Panel, courses: Mapping[str, Course]) -> Figure | None:
    """One panel: a curve for every run, or for every arm of one run; with several of both, a diagram for every arm."""
    arms = {name: trainings(course.lines, "arm") for name, course in courses.items()}
    names = list(dict.fromkeys(arm for by_arm in arms.values() for (arm,) in by_arm))
    if not names:
        return _diagrams(panel, {"": {name: [course.lines] for name, course in courses.items()}})
    if len(courses) == 1:
        (by_arm,) = arms.values()
        return _diagrams(panel, {"": {in_legend(str(arm)): by_arm[arm,] for arm in names}})
    each = {in_legend(str(arm)): {run: arms[run].get((arm,), []) for run in courses} for arm in names}
    return _diagrams(panel, each)


def _diagrams(panel: Panel, each: Mapping[str, Mapping[str, Sequence[Lines]]]) -> Figure | None:
    """A diagram for every title, with a curve of trainings for every name."""
    shown = {title: curves for title, curves in each.items() if any(_has(panel, runs) for runs in curves.values())}
    if not shown:
        return None
    wide = 1 if len(shown) == 1 else 2
    high = -(-len(shown) // wide)
    entries = next(iter(shown.values()))
    legend = len(entries) > 1 or bool(panel.looks)
    figure = sheet(WIDTH, (2.5 if high == 1 else 1.9 * high) + 0.2 * -(-len(entries) // 2))
    places = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
    limits: Limits = []
    for axes, (title, curves) in zip(places.flat, shown.items()):
        for number, (name, runs) in enumerate(curves.items()):
            if _has(panel, runs):
                limits += _draw(axes, panel, runs, _style(number), name or "training", alone=len(curves) == 1)
        axes.set_title(title, fontsize=9, fontweight="normal")
    for axes in places.flat[len(shown) :]:
        axes.remove()
    for axes in places[:, 0]:
        axes.set_ylabel(panel.label if high * wide == 1 else "")
    if high * wide > 1:
        figure.supylabel(panel.label, fontsize=10, color=INK)
        figure.supxlabel(panel.x[1], fontsize=10, color=INK)
    else:
        places[0, 0].set_xlabel(panel.x[1])
    _scale(places[0, 0], panel, limits)
    if legend and len(shown) == 1:
        legend_above(places[0, 0], columns=2)
    elif legend:
        handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=2, frameon=False)
    return figure


def _has(panel: Panel, runs: Sequence[Lines]) -> bool:
    names = [name for name in (panel.name, panel.looks) if name]
    return any(columns(lines, panel.x[0], name) for lines in runs for name in names)


def _draw(
    axes: Any, panel: Panel, runs: Sequence[Lines], style: Mapping[str, Any], name: str, *, alone: bool
) -> Limits:
    """The trainings of one name; returns values that the axes must show."""
    limits: Limits = []
    curves = [np.array(rows).T for lines in runs if panel.name and (rows := columns(lines, panel.x[0], panel.name))]
    if panel.x[0] not in ("updates", "iteration", "gradient_evaluations"):
        for number, (x, y) in enumerate(curves):
            axes.plot(x, y, "o", ms=5, mfc="none", color=style["color"], label="" if number else name)
            limits += y.tolist()
    elif len(curves) == 1 and len(curves[0][0]) > NOISY and alone | ("seed" not in runs[0][0]):
        x, y = curves[0]
        mean = smooth(y, max(1, len(y) // 20))
        axes.plot(x, y, lw=0.6, alpha=0.3, color=style["color"])
        axes.plot(x, mean, label=f"{name}, smoothed" if alone else name, **style)
        limits += [*np.quantile(y, [0.02, 0.98]), *mean]
    elif len({curve.shape for curve in curves}) == 1:
        x, ys = curves[0][0], np.stack([y for _, y in curves])
        axes.plot(x, ys.mean(0), marker="." if len(x) < 3 else "", label=name, **style)
        if len(ys) > 1:
            axes.fill_between(x, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, lw=0)
        limits += [*ys.min(0), *ys.max(0)]
    else:  # seeds of different lengths, while one of them goes on
        for number, (x, y) in enumerate(curves):
            axes.plot(x, y, label="" if number else name, **style)
            limits += y.tolist()
    for lines in runs if panel.looks else ():
        label = panel.looks_are if alone else "" if curves else name
        limits += _draw_looks(axes, panel, lines, style["color"], label)
    return limits


def _draw_looks(axes: Any, panel: Panel, lines: Lines, colour: str, label: str) -> Limits:
    """Evaluations on the way, with two standard errors where they have some."""
    rows = columns(lines, panel.x[0], panel.looks, error_of(panel.looks))
    rows = rows or [(x, y, 0.0) for x, y in columns(lines, panel.x[0], panel.looks)]
    if not rows:
        return []
    x, y, error = np.array(rows).T
    bars = {"fmt": "o", "ms": 4.5, "elinewidth": 1.2, "markeredgecolor": "white", "zorder": 4}
    axes.errorbar(x, y, 2 * error if error.any() else None, color=colour, label=label or "_", **bars)
    return [*(y - 2 * error), *(y + 2 * error)]


def _scale(axes: Any, panel: Panel, limits: Limits) -> None:
    """Limits that show every mean; single updates must not set the scale."""
    if panel.log and all(value > 0 for value in limits):
        axes.set_yscale("log")
        return
    low, high = min(limits), max(limits)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def draw_frontier(courses: Mapping[str, Course]) -> Figure | None:
    """What the plans allow, how the runs went, and where they ended; None where no run has a plan."""
    frontiers = {name: course.frontier for name, course in courses.items() if course.frontier is not None}
    if not frontiers:
        return None
    figure = sheet(WIDTH, 4.0 + 0.2 * -(-len(frontiers) // 2))
    axes = figure.subplots()
    plans: dict[tuple[Number, ...], list[str]] = {}
    for name, frontier in frontiers.items():
        plans.setdefault((frontier.pretrained, *(row.path_kl for row in frontier.optima)), []).append(name)
    reach = max((kl.value for f in frontiers.values() for kl, _ in [*f.way, *([f.end] if f.end else [])]), default=0.0)
    for names in plans.values():
        shared = len(names) == len(frontiers)
        colour = INK if shared else _style(list(courses).index(names[0]))["color"]
        _draw_optima(axes, frontiers[names[0]], colour, "optima of the plan" if shared else "", reach)
    for number, name in enumerate(courses):
        if name in frontiers:
            _draw_way(axes, frontiers[name], _style(number), name or "held-out noise")
    axes.set(xlabel="path KL to the pretrained model (nats)", ylabel="mean reward")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    legend_above(axes, columns=2)
    return figure


def _draw_optima(axes: Any, frontier: Frontier, colour: str, label: str, reach: float) -> None:
    """The optima up to the first beyond what the runs reached, and the pretrained model."""
    beyond = next((i for i, row in enumerate(frontier.optima) if row.path_kl.value > 1.2 * reach), None)
    optima = frontier.optima[: None if beyond is None or not reach else beyond + 1]
    style = {"fmt": "o", "ms": 5, "mfc": "white", "color": colour, "elinewidth": 1.0, "zorder": 3}
    _errorbars(axes, [(row.path_kl, row.reward) for row in optima], label=label or "_", **style)
    last = -1.0
    for row in optima if label else ():
        if row.path_kl.value - last > 0.1 * max(reach, optima[-1].path_kl.value):  # else one label hides the other
            place = {"xytext": (6, -11), "textcoords": "offset points", "fontsize": 8, "color": colour}
            axes.annotate(f"β = {row.kl_weight:.3g}", (row.path_kl.value, row.reward.value), **place)
            last = row.path_kl.value
    square = {"fmt": "s", "ms": 7, "color": "#7d838c", "zorder": 3}
    drawn = "pretrained" in axes.get_legend_handles_labels()[1]
    _errorbars(axes, [(Number(0.0), frontier.pretrained)], label="_" if drawn else "pretrained", **square)


def _draw_way(axes: Any, frontier: Frontier, style: Mapping[str, Any], name: str) -> None:
    """The way of one run, and its end."""
    kl, reward = ([number.value for number in numbers] for numbers in zip(*frontier.way)) if frontier.way else ((), ())
    axes.plot(kl, reward, marker=".", ms=5, label="_" if frontier.end else name, **{**style, "lw": 1.0})
    last = frontier.end or (frontier.way[-1] if frontier.way else None)
    if last is not None:
        marker = {"fmt": "D" if frontier.end else ".", "ms": 8, "markeredgecolor": "white", "elinewidth": 1.3}
        _errorbars(axes, [last], label=name if frontier.end else "_", color=style["color"], zorder=5, **marker)


def _errorbars(axes: Any, points: Sequence[tuple[Number, Number]], **options: Any) -> None:
    if points:
        x, y = zip(*points)
        errors = ([2 * (number.error or 0.0) for number in side] for side in (x, y))
        xerr, yerr = (error if any(error) else None for error in errors)
        axes.errorbar([n.value for n in x], [n.value for n in y], xerr=xerr, yerr=yerr, **options)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "ls": DASHES[number // len(COLOURS) % len(DASHES)]}
