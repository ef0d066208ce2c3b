"""The figures of `theory`: what was measured as points, what is exact as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.shared.drawing import UNWEIGHTED, WEIGHTED, finish_figure, sheet
from implicit_diffusion.commands.theory import linear
from implicit_diffusion.commands.theory.config import Config
from implicit_diffusion.commands.theory.denoising import Denoising, QueueResult
from implicit_diffusion.commands.theory.langevin import paper_steps, records
from implicit_diffusion.commands.theory.problems import LOCATION, PROBLEMS
from implicit_diffusion.commands.theory.runs import LENGTHS, PACES, Results
from implicit_diffusion.commands.theory.summary import Floor, FloorPoint, Lags, Rate, Summary
from implicit_diffusion.runs import RunDirectory

POINTS: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 4.5, "capsize": 2, "elinewidth": 1}
EXACT: dict[str, Any] = {"color": "0.25", "lw": 1, "zorder": 1}


def draw(config: Config, results: Results, summary: Summary, directory: RunDirectory) -> None:
    """All figures, as files of the run."""
    if results.rates is not None and summary.rates:
        _rates(config, results.rates, summary.rates, directory)
    if summary.floors:
        _floors(summary.floors, directory)
    if results.queue:
        _queue(results.queue, directory)
    if summary.lag:
        _lag(summary.lag, directory)


def _rates(
    config: Config, running: Float[Tensor, "records problems copies"], rates: list[Rate], directory: RunDirectory
) -> None:
    """The running mean of ∇ℓ² against K, a panel for each problem."""
    figure = sheet(11, 3.9)
    axes = figure.subplots(1, len(PROBLEMS), sharex=True)
    K = records(config.steps)
    for i, (axis, problem, rate) in enumerate(zip(axes, PROBLEMS, rates, strict=True)):
        means = running[:, i]
        low, high = means.quantile(torch.tensor([0.25, 0.75], dtype=means.dtype), dim=1)
        axis.fill_between(K, low, high, color=UNWEIGHTED, alpha=0.15, lw=0, label="middle half of the copies")
        axis.plot(K, means.mean(1), color=UNWEIGHTED, label="mean over copies")
        if problem is LOCATION:
            squares = linear.squared_gradients(paper_steps(config.steps), config.particles, LOCATION.start)
            axis.plot(K, squares.cumsum(0)[K - 1] / K, **EXACT | {"ls": "--", "zorder": 4}, label="closed form")
        bound = (2 + K.double().log()) / K.double() ** (1 / 3)
        axis.plot(K, bound * (2 * rate.mean / bound[-1]), color="C3", ls=":", label="shape of the paper's bound")
        wide = (rate.slope_high - rate.slope_low) / 2
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="iterations K",
            title=f"{problem.name}: slope {rate.slope:.2f} ± {wide:.2f}".replace("-", "−"),
        )
    axes[0].set_ylabel("mean of ‖∇ℓ‖² over k < K")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    finish_figure(figure, directory.figure("rates"), axes)


def _floors(floors: list[Floor], directory: RunDirectory) -> None:
    """What constant steps leave: the mean-field part against h, the noise against η/h."""
    figure = sheet(11, 6.6)
    axes = figure.subplots(2, len(floors))
    for column, floor in enumerate(floors):
        _mean_field(axes[0][column], floor)
        points = floor.by_ratio
        x, axis = [p.ratio for p in points], axes[1][column]
        axis.errorbar(x, [p.spread for p in points], [2 * p.spread_se for p in points], **POINTS, color=UNWEIGHTED)
        axis.plot(x, [_noise(p) for p in points], **EXACT)
        axis.set(xscale="log", yscale="log", xlabel="η/h", title=f"{floor.problem}: (η/h)^{floor.exponent_ratio:.2f}")
    axes[0][0].set_ylabel("mean field, (E ∇ℓ)²")
    axes[1][0].set_ylabel("noise, E (∇ℓ − E ∇ℓ)²")
    above, below = floors[0].by_step_size[0], floors[0].by_ratio[0]
    figure.suptitle(
        f"Floors of constant steps. Above: η/h = {above.ratio:g}, n = {above.particles}; "
        f"below: h = {below.step_size:g}, n = {below.particles}.\nPoints: measured, ± 2 s.e. (triangles: not seen, at "
        "2 s.e.). Lines: by quadrature (location: closed form)",
        fontsize=10,
    )
    finish_figure(figure, directory.figure("floors"), axes.flat)


def _mean_field(axis: Any, floor: Floor) -> None:
    points = floor.by_step_size
    seen = [p for p in points if abs(p.bias) > 2 * p.bias_se]
    unseen = [p for p in points if abs(p.bias) <= 2 * p.bias_se]
    errors = [
        [p.bias**2 - max(0.0, abs(p.bias) - 2 * p.bias_se) ** 2 for p in seen],
        [(abs(p.bias) + 2 * p.bias_se) ** 2 - p.bias**2 for p in seen],
    ]
    axis.errorbar([p.step_size for p in seen], [p.bias**2 for p in seen], errors, **POINTS, color=UNWEIGHTED)
    limits = [(2 * p.bias_se) ** 2 for p in unseen]
    axis.plot([p.step_size for p in unseen], limits, color=UNWEIGHTED, ls="none", marker="v", mfc="none", ms=5)
    title = f"{floor.problem}: no bias"
    if floor.exponent_h is not None:
        axis.plot([p.step_size for p in points], [p.bias_exact**2 for p in points], **EXACT)
        title = f"{floor.problem}: h^{floor.exponent_h:.2f}"
    axis.set(xscale="log", yscale="log", xlabel="h", title=title)


def _noise(point: FloorPoint) -> float:
    exact = point.floor_predicted if point.floor_exact is None else point.floor_exact
    return exact - point.bias_exact**2


def _queue(results: list[tuple[QueueResult, Float[Tensor, "2 times"]]], directory: RunDirectory) -> None:
    """The mean error of θ in time, the rate at which it falls, and the variance of θ in the end."""
    figure = sheet(11, 3.9)
    left, middle, right = figure.subplots(1, 3)
    for i, N in enumerate(LENGTHS):
        runs = [(numbers, path) for numbers, path in results if numbers.num_steps == N]
        numbers, style = [n for n, _ in runs], POINTS | {"color": f"C{i}", "label": f"N = {N}"}
        _decay(left, Denoising(N, PACES[1]), runs[1][1], f"C{i}")
        exact = [1 - n.rate_exact for n in numbers]
        middle.errorbar(exact, [1 - n.rate for n in numbers], [2 * n.rate_se for n in numbers], **style)
        paces, variances = [n.pace for n in numbers], [n.variance for n in numbers]
        right.errorbar(paces, variances, [2 * n.variance_se for n in numbers], **style)
        right.plot(paces, [n.variance_exact for n in numbers], color=f"C{i}", lw=1)
    rates = [1 - n.rate_exact for n, _ in results]
    middle.plot([min(rates), max(rates)], [min(rates), max(rates)], **EXACT)
    left.set(yscale="log", xlabel="iterations", ylabel="|mean θ − θ*|", title=f"Mean error at ηG² = {PACES[1]:g}")
    left.set_ylim(bottom=2e-3)
    middle.set(xscale="log", yscale="log", xlabel="of the recursion", ylabel="measured", title="1 − rate of the mean")
    right.set(xscale="log", yscale="log", xlabel="ηG²", ylabel="variance of θ", title="Noise of θ in the end")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(LENGTHS), frameon=False)
    figure.suptitle("The queue on a Gaussian. Points: measured, ± 2 s.e.; lines: closed form", fontsize=10)
    finish_figure(figure, directory.figure("queue"), (left, middle, right))


def _decay(axis: Any, problem: Denoising, path: Float[Tensor, "2 times"], colour: str) -> None:
    """|mean error| of the queue until it is lost in its own error, beside the recursion's."""
    mean, error = path
    off = (mean - problem.optimum).abs()
    lost = (off < 2 * error).nonzero()
    end = int(lost[0]) if len(lost) else len(off)
    exact = (problem.path(end - 1) - problem.optimum).abs()
    every = max(1, end // 14)
    axis.plot(range(end), exact, color=colour, lw=1)
    style = POINTS | {"ms": 3.5}
    axis.errorbar(range(0, end, every), off[:end:every], 2 * error[:end:every], **style, color=colour)


def _lag(lag: Lags, directory: RunDirectory) -> None:
    """Left: the lag of plain particles. Right: that of weighted ones beside it."""
    figure = sheet(9.2, 3.9)
    left, right = figure.subplots(1, 2)
    points = lag.points
    x = [p.ratio for p in points]
    for axis in (left, right):
        _lags(axis, x, [p.unweighted for p in points], [p.unweighted_se for p in points], UNWEIGHTED, "unweighted")
        axis.plot(x, [p.unweighted_exact for p in points], **EXACT, label="closed form")
    _lags(right, x, [p.weighted for p in points], [p.weighted_se for p in points], WEIGHTED, "weighted")
    left.plot(x, x, color="C3", ls=":", label="η/h")
    right.axhline(0, color="0.6", lw=0.8)
    label = "(mean of particles − mean of π)/(θ − θ*)"
    left.set(xscale="log", yscale="log", xlabel="η/h", ylabel=label, title=f"Lag ~ (η/h)^{lag.exponent:.2f}")
    right.set(xscale="log", xlabel="η/h", title="With weights there is none")
    left.legend(frameon=False)
    right.legend(frameon=False, loc="upper left")
    finish_figure(figure, directory.figure("lag"), (left, right))


def _lags(axis: Any, x: Sequence[float], y: Sequence[float], se: Sequence[float], colour: str, label: str) -> None:
    axis.errorbar(x, y, [2 * error for error in se], **POINTS, color=colour, label=label)
