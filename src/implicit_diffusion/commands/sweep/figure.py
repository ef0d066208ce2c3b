"""The picture of a sweep: the frontier with all runs, and their reward and path KL over the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from implicit_diffusion.commands.finetune.report.figures import BEFORE, BOUND, canvas
from implicit_diffusion.commands.finetune.report.frontier import tangent_curve
from implicit_diffusion.commands.shared.drawing import STYLE, legend_above, save
from implicit_diffusion.commands.shared.formatting import distinct
from implicit_diffusion.commands.sweep.summary import SweepSummary
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.extras import require
from implicit_diffusion.runs.clock import part


@part("drawing")
def plot(
    summary: SweepSummary,
    metrics: Mapping[float, Sequence[Mapping[str, Any]]],
    frontier: Sequence[Bound],
    path: Path,
) -> None:
    """Draw the picture, one colour per β.

    Args:
        summary: of the sweep.
        metrics: lines of metrics.jsonl of every run, by β.
        frontier: the optimum for some β, in decreasing order of β.
        path: of the file.
    """
    require("matplotlib")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        rows = summary.rows
        shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(rows)))
        figure = canvas(7.6)
        axes = figure.subplot_mosaic([["top", "top"], ["reward", "kl"]], height_ratios=[3, 2])
        _draw_frontier(axes["top"], summary.reward_pretrained.mean, frontier)
        weights = distinct([row.kl_weight for row in rows], 3)
        for weight, row, shade in zip(weights, rows, shades):
            kl, gain = row.headline.path_kl, row.headline.reward_gain
            if kl is not None:
                style = {"xerr": 2 * kl.error, "yerr": 2 * gain.error, "elinewidth": 1.3, "fmt": "D"}
                style |= {"color": shade, "markeredgecolor": "white", "zorder": 5}
                axes["top"].errorbar(kl.mean, gain.mean, label=f"fine-tuned, β = {weight}", **style)
            begun, before = row.headline.untrained, row.headline.reward_before.mean
            base = {"held_out_reward": row.held_out_reward_before, "held_out_path_kl": 0.0}
            first = {"held_out_reward": 0.0, "held_out_path_kl": 0.0}
            if begun is not None:
                first = {"held_out_reward": begun.reward.mean - before, "held_out_path_kl": begun.path_kl.mean}
            for name, key in (("reward", "held_out_reward"), ("kl", "held_out_path_kl")):
                seen = [m for m in metrics[row.kl_weight] if m.get(key) is not None]
                values = [first[key], *(m[key] - base[key] for m in seen)]
                axes[name].plot([0, *(m["updates"] for m in seen)], values, "o-", ms=3, color=shade)
        legend_above(axes["top"], columns=2)
        axes["reward"].axhline(0.0, color=BEFORE, lw=1)
        axes["reward"].set(xlabel="updates", ylabel="reward gained, held out")
        axes["kl"].set(xlabel="updates", ylabel="path KL (nats), held out")
        save(figure, path)


def _draw_frontier(axes: Any, before: float, frontier: Sequence[Bound]) -> None:
    """What can be reached: the curve, and open circles where it rests on too few effective samples."""
    bounds = [b for b in frontier if b.path_kl > 0]
    if bounds:
        kl, knots = np.linspace(0, bounds[-1].path_kl, 300), bounds[:1]
        for b in bounds[1:]:  # the curve needs knots apart
            knots += [b] if b.path_kl > 1.001 * knots[-1].path_kl else []
        axes.plot(kl, tangent_curve(before, knots, kl) - before, color=BOUND, label="best possible")
    doubtful = [b for b in bounds if not b.trusted]
    if doubtful:
        points = [b.path_kl for b in doubtful], [b.reward - before for b in doubtful]
        axes.plot(*points, "o", ms=4.5, color=BOUND, markerfacecolor="white", label="rests on few samples")
    axes.plot([0], [0], "s", color=BEFORE, ms=8, label="pretrained")
    axes.set(xlabel="path KL to the pretrained model (nats)", ylabel="mean reward gained, on the same noise")
