"""How the training of an energy-based model went: numbers of its particles, weights and sampler against updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.ebm.summary import Summary
from implicit_diffusion.commands.shared.drawing import WEIGHTED, sheet, smooth
from implicit_diffusion.loops.diagnostics import ACCEPTED, EFFECTIVE, LAG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE, LIGHT, EXACT, END = WEIGHTED, "#b5dcc4", "0.2", "#c1666b"


def draw_curves(lines: list[dict[str, Any]], summary: Summary, data: Data, particles: int) -> Figure | None:
    """Curves of metrics.jsonl, three or four in a row; None where there are none.

    Args:
        lines: of metrics.jsonl.
        summary: the headline numbers, for the ends of the curves.
        data: for the units of the likelihood.
        particles: how many there were.
    """
    volume = data.scale.double().expand(data.event_shape).log().sum().item() - data.log_cell

    def nll(axes: Any) -> None:
        _noisy(axes, lines, "nll", shift=volume, label="training")
        _points(axes, lines, "exact_nll", "exact")
        _level(axes, summary.nll_gaussian, summary.nll_gaussian_se, "a Gaussian, held out", "0.5")
        _level(axes, summary.nll_law, summary.nll_law_se, "the law of the data", EXACT)
        _end(axes, lines, summary.nll_held_out, summary.nll_held_out_se, "held out")

    def kl(axes: Any) -> None:
        _points(axes, lines, "exact_kl", "exact")
        axes.set_yscale("log")

    def log_z(axes: Any) -> None:
        _noisy(axes, lines, "log_z", label="training's own weights")
        _points(axes, lines, "exact_log_z", "exact")
        _end(axes, lines, summary.log_z_estimate, summary.log_z_estimate_se, "annealing")

    def gap(axes: Any) -> None:
        x, y, error = _columns(lines, "updates", "energy_gap", "energy_gap_se")
        axes.axhline(0, color="0.6", lw=0.8)
        axes.fill_between(x, y - 2 * error, y + 2 * error, color=LIGHT, lw=0)
        axes.plot(x, y, color=LINE, lw=1.3)

    def series(name: str, *limits: float, scale: float = 1.0) -> Callable[[Any], None]:
        def drawing(axes: Any) -> None:
            _noisy(axes, lines, name, scale=scale)
            for limit in limits:
                axes.axhline(limit, color=END, lw=1, ls=":")

        return drawing

    panels: dict[str, tuple[str, Callable[[Any], None]]] = {
        "nll": ("−log-likelihood (nats per datum)", nll),
        "exact_kl": ("exact KL(data‖model) (nats)", kl),
        "log_z": ("log Z", log_z),
        "energy_gap": ("mean energy, data − particles (nats)", gap),
        "ess": ("effective particles, share of all", series("ess", EFFECTIVE, scale=1 / particles)),
        "lag": ("lag (deviations)", series("lag", LAG)),
        "acceptance": ("proposals accepted", series("acceptance", *ACCEPTED)),
        "step_size": ("step size", series("step_size")),
        "grad_norm": ("norm of the gradient Γ", series("grad_norm")),
    }
    panels = {name: panel for name, panel in panels.items() if len(_columns(lines, "updates", name)[0]) > 1}
    if not panels:
        return None
    width = min(len(panels), 4 if len(panels) % 3 == 1 else 3)  # no row with a single one
    rows = -(-len(panels) // width)
    figure = sheet(4 * width, 0.3 + 2.9 * rows)
    places = figure.subplots(rows, width, squeeze=False).flatten()
    for axes, (label, drawing) in zip(places, panels.values()):
        drawing(axes)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_xlabel("updates")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    for axes in places[len(panels) :]:
        axes.remove()
    return figure


def _columns(lines: list[dict[str, Any]], *names: str) -> np.ndarray:
    """Rows of numbers, one for each name, from the lines that have all of them."""
    whole = [line for line in lines if all(line.get(name) is not None for name in names)]
    return np.array([[float(line[name]) for name in names] for line in whole]).reshape(-1, len(names)).T


def _noisy(
    axes: Any,
    lines: list[dict[str, Any]],
    name: str,
    *,
    shift: float = 0.0,
    scale: float = 1.0,
    label: str | None = None,
) -> None:
    """Every update thin, the running mean thick."""
    x, y = _columns(lines, "updates", name)
    y = scale * y + shift
    axes.plot(x, y, color=LIGHT, lw=0.7)
    axes.plot(x, smooth(y, len(y) // 50), color=LINE, lw=1.6, label=label)


def _points(axes: Any, lines: list[dict[str, Any]], name: str, label: str) -> None:
    """Exact figures on the way, where there are some."""
    x, y = _columns(lines, "updates", name)
    if len(x):
        axes.plot(x, y, color=EXACT, marker=".", lw=1, label=label)


def _level(axes: Any, value: float | None, error: float | None, label: str, colour: str) -> None:
    """A number that does not change, with two standard errors; nothing where there is none."""
    if value is not None and error is not None:
        axes.axhline(value, color=colour, lw=1.1, ls=(0, (5, 3)), label=label)
        axes.axhspan(value - 2 * error, value + 2 * error, color=colour, alpha=0.12, lw=0)


def _end(axes: Any, lines: list[dict[str, Any]], value: float, error: float, label: str) -> None:
    """A number that is known when training has ended, with two standard errors."""
    style = {"fmt": "o", "ms": 4.5, "color": END, "zorder": 4}
    axes.errorbar(lines[-1]["updates"], value, 2 * error, label=label, **style)
