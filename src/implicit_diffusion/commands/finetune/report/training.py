"""The course of a run: its curves, their cost, and how stale the queue's gradients were."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_diffusion.commands.finetune.report.figures import AFTER, BEFORE, BOUND, EXPORTED, canvas
from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.shared.drawing import INK, legend_above, smooth
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.evaluation.chains import Estimate

LIGHT = "#9cc5e0"  # training noise
UNTRAINED = {"objective": "j", "reward": "reward", "path_kl": "path_kl"}  # what is drawn of the untrained chain


def training(result: Result) -> tuple[Any, str, str] | None:
    """J, reward and path KL against updates, on training noise and on held-out noise."""
    headline, best, target = result.summary.headline, result.bound, result.config.target_kl
    rows: list[tuple[str, str, Estimate | None, Estimate | None]] = [
        ("objective", "J  (lower is better)", headline.j_before, _optimum(best, "j")),
        ("reward", "mean reward", headline.reward_before, _optimum(best, "reward")),
        ("path_kl", "path KL (nats)", None, _optimum(best, "path_kl")),
    ]
    rows = [row for row in rows if row[0] == "reward" or not result.drift]
    rows = [row for row in rows if result.column(row[0]) or result.column("held_out_" + row[0])]
    if not rows:
        return None
    figure = canvas(0.55 + 1.95 * len(rows))
    panels = np.atleast_1d(figure.subplots(len(rows), 1, sharex=True))
    for axes, (name, label, before, optimum) in zip(panels, rows):
        if before is not None:
            _level(axes, *before, BEFORE, "pretrained" if headline.untrained is None else "pretrained, guided")
        begun: Estimate | None = None if headline.untrained is None else getattr(headline.untrained, UNTRAINED[name])
        if begun is not None:
            _level(axes, begun.mean, begun.error, EXPORTED, "untrained")
        if optimum is not None:
            _level(axes, *optimum, BOUND, "optimum")
        if name == "path_kl" and target is not None:
            _level(axes, target, None, INK, "target")
        noisy = result.column("updates", name)
        if noisy:
            x, y = np.array(noisy).T
            axes.plot(x, y, color=LIGHT, lw=0.6, alpha=0.55)
            axes.plot(x, smooth(y, max(1, len(y) // 20)), color=LIGHT, lw=1.8, label="training noise, smoothed")
        held_out = result.column("updates", "held_out_" + name, f"held_out_{name}_se")
        if held_out:
            x, y, error = np.array(held_out).T
            bars = {"fmt": "o", "ms": 5, "color": AFTER, "elinewidth": 1.3, "markeredgecolor": "white", "zorder": 4}
            axes.errorbar(x, y, 2 * error, label="held-out noise, ± 2 s.e.", **bars)
        _limit(axes, noisy, held_out, [level.mean for level in (before, begun, optimum) if level is not None])
        axes.set_ylabel(label)
        axes.yaxis.set_label_coords(-0.13, 0.5)
    panels[-1].set_xlabel("updates")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, columnspacing=1.2, handlelength=1.6)
    caption = (
        "The thin line is the batch of each update, the thick one its running mean; points are on noise that training "
        "never sees. Bands are ± 2 standard errors."
    )
    if best is not None:
        caption += " The optimum is the bound of this KL weight: no sampler of this chain has a lower J."
    if result.column("staleness_max"):
        caption += " The queue's batches set out some updates earlier; while it drains at the end, none arrive."
    if result.column("kl_weight"):
        caption += " The KL weight was adapted on the way, so J and the optimum belong to its last value."
    return figure, "How training went", caption


def cost(result: Result) -> tuple[Any, str, str] | None:
    """J on held-out noise against seconds and against network evaluations."""
    headline, spent, best = result.summary.headline, result.summary.training, result.bound
    begun = headline.j_begun
    if headline.j_before is None or begun is None or headline.j_after is None:
        return None
    figure = canvas(3.0)
    panels = figure.subplots(1, 2, sharey=True)
    units = (
        ("seconds", 1.0, "seconds"),
        ("network_evaluations", _scale(float(spent.network_evaluations)), "evaluations"),
    )
    for axes, (name, scale, label) in zip(panels, units):
        _level(axes, *headline.j_before, BEFORE, "pretrained" if headline.untrained is None else "pretrained, guided")
        if best is not None:
            _level(axes, best.j, best.j_se, BOUND, "best possible")
        points = result.column(name, "held_out_objective", "held_out_objective_se")
        start, end = (0.0, *begun), (float(getattr(spent, name)), *headline.j_after)
        x, y, error = np.array([start, *points, end]).T
        axes.plot(x / scale, y, color=AFTER, lw=1.4)
        bars = {"fmt": "none", "ecolor": AFTER, "elinewidth": 1.3}
        axes.errorbar(x / scale, y, 2 * error, **bars)
        axes.plot(x[1:-1] / scale, y[1:-1], "o", ms=5, color=AFTER, markeredgecolor="white", label="during")
        axes.plot(x[-1:] / scale, y[-1:], "D", ms=7, color=AFTER, markeredgecolor="white", label="fine-tuned")
        power = {1.0: "", 1e3: " (thousands)", 1e6: " (millions)", 1e9: " (billions)"}[scale]
        axes.set_xlabel(label + power)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_ylabel("J on held-out noise")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.0, handlelength=1.4)
    caption = (
        "J is the KL weight times the path KL, less the reward. Seconds are those of the training loop; evaluations "
        "count every image that passes a network, in training only. Bars and bands are ± 2 standard errors."
    )
    return figure, "What it cost", caption


def staleness(result: Result) -> tuple[Any, str, str] | None:
    """Age of the trajectories in each gradient of the queue; None for the nested loop."""
    rows = result.column("updates", "staleness_mean", "staleness_max")
    if not rows:
        return None
    x, mean, most = np.array(rows).T
    figure = canvas(2.7)
    axes = figure.subplots()
    axes.fill_between(x, mean, most, color=LIGHT, alpha=0.35, lw=0, step="mid")
    axes.plot(x, most, color=LIGHT, drawstyle="steps-mid", label="oldest")
    axes.plot(x, mean, color=AFTER, drawstyle="steps-mid", label="mean")
    axes.set(xlabel="updates", ylabel="age (updates)", ylim=(0, 1.12 * max(1.0, most.max())))
    legend_above(axes, columns=2)
    flight = -(-(result.config.num_steps or 1) // (result.config.stride or 1))
    caption = (
        "Updates of the network between the injection of a trajectory and its contribution to a gradient. The queue "
        f"holds {flight} batches each way, fills at the start and drains at the end; the age is the price for an "
        "update per pass instead of one per trajectory."
    )
    return figure, "Age of the queue's gradients", caption


def _optimum(best: Bound | None, name: str) -> Estimate | None:
    """A number of the optimum."""
    return None if best is None else Estimate(getattr(best, name), getattr(best, name + "_se"))


def _level(axes: Any, value: float, error: float | None, colour: str, label: str) -> None:
    """A horizontal line with its band of two standard errors."""
    axes.axhline(value, color=colour, lw=1.2, ls=(0, (5, 3)), label=label, zorder=1)
    if error:
        axes.axhspan(value - 2 * error, value + 2 * error, color=colour, alpha=0.15, lw=0)


def _limit(axes: Any, noisy: list[tuple[float, ...]], held_out: list[tuple[float, ...]], levels: list[float]) -> None:
    """Limits that show every mean and 96 % of the noise: single batches must not set the scale."""
    values = [*levels, *(y for _, y, _ in held_out)]
    if noisy:
        y = np.array(noisy)[:, 1]
        values += [*np.quantile(y, [0.02, 0.98]), *smooth(y, max(1, len(y) // 20))]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _scale(largest: float) -> float:
    """1, a thousand, a million or a billion, so that numbers stay short."""
    return next(scale for scale in (1e9, 1e6, 1e3, 1.0) if largest >= scale or scale == 1.0)
