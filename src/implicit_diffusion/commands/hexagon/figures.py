"""Pictures of the hexagon: where the particles are, what they earn, and whether they keep up with θ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from implicit_diffusion.commands.shared.drawing import UNWEIGHTED, WEIGHTED, finish_figure, sheet
from implicit_diffusion.commands.shared.hexagon_problem import MODES, mixture
from implicit_diffusion.runs import RunDirectory

if TYPE_CHECKING:
    from implicit_diffusion.commands.hexagon.trace import Trace

COLOURS = {
    "untrained": "#8a8f98",
    "implicit": UNWEIGHTED,
    "weighted": WEIGHTED,
    "guidance": "#b07aa1",
    "transfer": "#333333",
    "nested": "#e0a458",
    "nested_tuned": "#b5651d",
    "unrolled": "#e59c8a",
    "unrolled_tuned": "#c8553d",
}
PICTURED = ("untrained", "implicit", "guidance", "transfer")  # more would be too small to see
WITH_MODES = ("implicit", "weighted", "nested", "unrolled")  # arms whose softmax(θ) is drawn


def draw(sigma: float, traces: Sequence[Trace], directory: RunDirectory) -> None:
    """particles, curves, modes and lag, as PNG files in the run directory."""
    _particles(sigma, traces, directory)
    _curves(traces, directory)
    _modes(traces, directory)
    _lag(traces, directory)


def _particles(sigma: float, traces: Sequence[Trace], directory: RunDirectory) -> None:
    """Columns: the paper's arms, of the first seed; rows: before, half-way, after; contours of π_θ there."""
    shown = [trace for trace in traces if trace.seed == traces[0].seed and trace.arm in PICTURED]
    figure = sheet(2.3 * len(shown), 7.2)
    axes = figure.subplots(3, len(shown), squeeze=False)
    half = 4 + 3.2 * max(sigma, 0.35)
    axis = torch.linspace(-half, half, 220, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for column, trace in enumerate(shown):
        for row, ((x, logits), when) in enumerate(zip(trace.clouds, ("first step", "half-way", "end"))):
            ax = axes[row][column]
            with torch.no_grad():
                log_density = -mixture(logits, sigma, torch.float64)(grid)
            density = (log_density - log_density.max()).exp().view(220, 220).T  # narrow modes may miss all points
            ax.contour(axis, axis, density, levels=[0.03, 0.1, 0.3, 0.7], colors="0.45", linewidths=0.7)
            points = x[:: max(1, len(x) // 400)]
            ax.plot(points[:, 0], points[:, 1], ".", ms=4, alpha=0.6, color=COLOURS[trace.arm], mew=0)
            ax.plot([4], [3.8], "k+", ms=7)
            ax.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
            ax.tick_params(labelsize=7)
            if row == 0:
                ax.set_title(trace.arm, fontsize=10)
            if column == 0:
                ax.set_ylabel(f"{when}\nx₂", fontsize=9)
            if row == 2:
                ax.set_xlabel("x₁", fontsize=9)
    figure.suptitle("Particles over the density of their potential (lines); + is where the reward points", fontsize=11)
    finish_figure(figure, directory.figure("particles"))


def _curves(traces: Sequence[Trace], directory: RunDirectory) -> None:
    """Reward of the particles, exact reward and exact KL against gradient evaluations, iterations and seconds."""
    rows = (
        ("reward", "reward of the particles"),
        ("reward_exact", "E R under π_θ"),
        ("kl_from_initial", "KL(π_θ‖π_θ0)"),
    )
    columns = (
        ("iteration", "updates (sampler steps without training)"),
        ("gradient_evaluations", "gradient evaluations"),
        ("seconds", "seconds"),
    )
    figure = sheet(12, 9)
    axes = figure.subplots(3, 3, sharey="row", sharex="col")
    for name in dict.fromkeys(trace.arm for trace in traces):
        group = [trace for trace in traces if trace.arm == name]
        for i, (value, label) in enumerate(rows):
            ys = _column(group, value)
            if ys is None:
                continue
            for j, (what, title) in enumerate(columns):
                x = _column(group, what)
                assert x is not None
                _band(axes[i][j], x.mean(0), ys, COLOURS[name], name)
                axes[i][0].set_ylabel(label)
                axes[2][j].set_xlabel(title)
    axes[0][1].set_xlim(left=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    seeds = len({trace.seed for trace in traces})
    figure.suptitle(f"Means over {seeds} seeds; bands: the middle half of them")
    finish_figure(figure, directory.figure("curves"), axes.flat)


def _modes(traces: Sequence[Trace], directory: RunDirectory) -> None:
    """softmax(θ) against iterations, one panel per arm that trains."""
    names = [name for name in dict.fromkeys(t.arm for t in traces) if name in WITH_MODES]
    figure = sheet(3.1 * len(names), 3.3)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)
    colours = [f"C{i}" for i in range(MODES)]
    for ax, name in zip(axes[0], names):
        group = [trace for trace in traces if trace.arm == name]
        x = _column(group, "iteration")
        assert x is not None
        for mode in range(MODES):
            ys = torch.tensor([[point["mode_probabilities"][mode] for point in trace.points] for trace in group])
            _band(ax, x.mean(0), ys, colours[mode], f"mode {mode + 1}")
        ax.set(title=name, xlabel="updates", ylim=(0, 1))
    axes[0][0].set_ylabel("softmax(θ)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=MODES, frameon=False)
    finish_figure(figure, directory.figure("modes"), axes.flat)


def _lag(traces: Sequence[Trace], directory: RunDirectory) -> None:
    """Left: the lag of unweighted particles. Right: their reward less the exact one under θ, beside the weighted."""
    figure = sheet(9.2, 3.6)
    left, right = figure.subplots(1, 2)
    for name in ("implicit", "weighted"):
        group = [trace for trace in traces if trace.arm == name]
        x, reward, exact = (_column(group, what) for what in ("iteration", "reward", "reward_exact"))
        assert x is not None and reward is not None and exact is not None
        _band(right, x.mean(0), reward - exact, COLOURS[name], name)
        lag = _column(group, "lag")
        if lag is not None:
            _band(left, x.mean(0), lag, COLOURS[name], name)
    left.axhline(0.2, color="0.5", ls=":", lw=1)
    left.set(
        xlabel="updates",
        ylabel="lag (deviations)",
        title="Weighted against plain means of the particles",
        ylim=(0, None),
    )
    right.axhline(0, color="0.5", lw=0.8)
    right.set(xlabel="updates", ylabel="reward of the particles − E R under π_θ", title="How far behind θ they are")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    finish_figure(figure, directory.figure("lag"), (left, right))


def _column(group: Sequence[Trace], name: str) -> Tensor | None:
    """A quantity as (seeds, records); None where some record lacks it."""
    rows = [[point.get(name) for point in trace.points] for trace in group]
    if any(value is None for row in rows for value in row):
        return None
    return torch.tensor(rows, dtype=torch.float64)


def _band(ax: Any, x: Tensor, ys: Tensor, colour: str, label: str) -> None:
    ax.plot(x, ys.mean(0), color=colour, lw=1.8, label=label, zorder=3)  # over all bands
    low, high = ys.quantile(torch.tensor([0.25, 0.75], dtype=ys.dtype), dim=0)
    ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
