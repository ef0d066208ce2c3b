r"""Reward against path KL: what can be reached, and what was reached.

For every β no control of the chain gets below J*_β = min(−E R + β·KL), so every point (KL, E R) obeys

    E R ≤ min_β (−J*_β + β·KL)

and the region above is out of reach. The law that attains J*_β touches its line there: the frontier has slope
dR/dKL = β. We draw it through the planned points with those slopes, as a cubic in √KL, in which it starts straight.

Plan, training and judgement each have noise of their own, on which the pretrained model earns more or less; so what is
shown is the gain over the pretrained model on the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from implicit_diffusion.commands.finetune.report.figures import AFTER, BEFORE, BOUND, canvas
from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.shared.drawing import FAINT, INK, legend_above
from implicit_diffusion.commands.shared.formatting import number, percent
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.evaluation.gains import Reweighted
from implicit_diffusion.extras import require

NEAR = 0.1  # planned KL weights that differ by less from the run's own are left to the run
CROWDED = 0.04  # of the height of the axes, between points of which each has a label


def frontier(result: Result) -> tuple[Any, str, str] | None:
    """The planned frontier with its errors, the training trajectory on held-out noise, and what is missing."""
    headline, best = result.summary.headline, result.bound
    if best is None or headline.path_kl is None:
        return None
    before, gain = headline.reward_before.mean, headline.reward_gain
    path = result.column("updates", "held_out_path_kl", "held_out_reward")
    weighted = _by_weights(result)
    reach = 1.45 * max(best.path_kl, headline.path_kl.mean, *(kl for _, kl, *_ in path), 1e-6)
    reach = max([reach, *(1.1 * law.path_kl.mean for law in weighted)])
    begun = headline.untrained
    reach = max(reach, 1.1 * begun.path_kl.mean) if begun is not None else reach
    plan = result.plan.reward
    bounds = [b for b in result.plan.bounds if b.path_kl > 0 and abs(b.beta / best.beta - 1) > NEAR]
    path = [(n, kl, reward - result.summary.training.held_out_reward_before) for n, kl, reward in path]
    figure = canvas(5.1)
    axes = figure.subplots()

    kl = np.linspace(0, reach, 400)
    trusted = [(b, plan) for b in bounds if b.trusted] + [(best, before)]
    ceiling = np.min([-(b.j - 2 * b.j_se) - reward + b.beta * kl for b, reward in trusted], axis=0)
    optimum = best.reward - before
    knots = [replace(b, reward=b.reward - plan) for b in bounds]
    knots += [replace(best, reward=optimum)] if best.path_kl > 0 else []
    curve = tangent_curve(0.0, sorted(knots, key=_path_kl), kl) if knots else np.full_like(kl, np.nan)
    low = min(0.0, gain.mean, *(gained for *_, gained in path), 0.0 if begun is None else begun.reward.mean - before)
    high = max(
        optimum, gain.mean, float(np.nanmax(curve, initial=optimum)), *(law.reward_gain.mean for law in weighted)
    )
    limits = low - 0.12 * (high - low), high + 0.22 * (high - low)
    axes.fill_between(kl, ceiling, limits[1], color=FAINT, alpha=0.65, lw=0)
    axes.annotate("out of reach", (0.04, 0.93), xycoords="axes fraction", color="#5b626c", fontstyle="italic")

    axes.plot(kl, curve, color=BOUND, label="best possible, by KL weight")
    errors = {b.beta: error for b, error in zip(result.plan.bounds, result.plan.gain_se)}
    labelled: list[float] = []
    for certain in (True, False):
        shown = [b for b in bounds if b.trusted is certain and b.path_kl < reach]
        colour = {"color": BOUND, "markerfacecolor": BOUND if certain else "white"}
        rows = [(b.path_kl, b.path_kl_se, b.reward - plan, errors[b.beta]) for b in shown]
        _points(axes, rows, fmt="o", ms=4.5, **colour)
        for b in shown:
            place = {"xytext": (6, -12), "textcoords": "offset points", "fontsize": 8, "color": BOUND, "zorder": 6}
            gained = b.reward - plan
            if all(abs(gained - other) > CROWDED * (high - low) for other in labelled):  # or labels cover each other
                axes.annotate(f"β = {b.beta:.3g}", (b.path_kl, gained), **place)
                labelled.append(gained)
    line = -best.j - before + best.beta * kl
    axes.plot(kl, line, color=INK, lw=1, ls=(0, (5, 3)), label=f"best J at KL weight {best.beta:.3g}")

    if path:
        updates, xs, ys = np.array(path).T
        start = (0.0, 0.0) if begun is None else (begun.path_kl.mean, begun.reward.mean - before)
        axes.plot([start[0], *xs], [start[1], *ys], color="#9aa1ab", lw=0.9, zorder=2)
        dots = axes.scatter(xs, ys, c=updates, cmap="viridis_r", s=26, zorder=4, label="training, held-out noise")
        if len(path) > 1:
            bar = figure.colorbar(dots, ax=axes, location="bottom", shrink=0.55, aspect=32, pad=0.02)
            bar.set_label("update", fontsize=9)
            bar.outline.set_visible(False)
            bar.locator = _few_ticks()
            bar.update_ticks()
    _draw_by_weights(axes, weighted)
    _points(axes, [(0.0, 0.0, 0.0, 0.0)], fmt="s", color=BEFORE, ms=8, label="pretrained")
    if begun is not None:
        row = (*begun.path_kl, begun.reward.mean - before, 0.0)
        _points(axes, [row], fmt="s", color=BEFORE, markerfacecolor="white", ms=8, label="untrained")
    _points(axes, [(best.path_kl, best.path_kl_se, optimum, 0.0)], fmt="*", color=BOUND, ms=13)
    final = (*headline.path_kl, *gain)
    _points(axes, [final], fmt="D", color=AFTER, ms=8, label="fine-tuned")
    axes.set(xlabel="path KL to the pretrained model (nats)", ylabel="mean reward gained", xlim=(-0.02 * reach, reach))
    axes.set_ylim(*limits)
    legend_above(axes, columns=2)
    pair = ("trained", "pretrained")
    source, other = reversed(pair) if headline.j_bound_from == "pretrained" else pair
    assert headline.j_after is not None
    caption = (
        "Up is more reward than the pretrained model earns on the same noise, right is farther from it; bars are ± 2 "
        "standard errors. No sampler of this chain enters the grey region; means over few draws, such as the dots of "
        "the training, may stray into it. The frontier comes from pretrained samples alone, except for the star, the "
        f"optimum of this run's KL weight, which {source} samples of the final noise determine more sharply than "
        f"{other} ones. {_words_by_weights(weighted)}The run ends "
        f"{number(headline.j_after.mean - best.j, digits=2)} of reward below the dashed line"
    )
    share = headline.captured
    first = "pretrained" if begun is None else "untrained"
    caption += "." if share is None else f", {percent(share.mean)} of the way from the {first} model."
    return figure, "Reward against path KL", caption


def _by_weights(result: Result) -> list[Reweighted]:
    """The weighted laws by falling KL weight; of those not trusted, the first on either side."""
    by_weights = result.summary.by_weights
    laws = [*by_weights.reweighted_nearby, *([by_weights.reweighted] if by_weights.reweighted else [])]
    laws.sort(key=lambda law: -law.kl_weight)
    trusted = [place for place, law in enumerate(laws) if law.trusted]
    return laws[max(0, trusted[0] - 1) : trusted[-1] + 2] if trusted else []


def _draw_by_weights(axes: Any, laws: Sequence[Reweighted]) -> None:
    """Triangles with their errors; hollow, and on a dashed line, where they are not trusted."""
    for one, other in pairwise(laws):
        line = {"ls": "-" if one.trusted and other.trusted else (0, (3, 2)), "color": AFTER, "lw": 1, "zorder": 3}
        axes.plot(*zip(*((law.path_kl.mean, law.reward_gain.mean) for law in (one, other))), **line)
    for certain in (True, False):
        style = {"fmt": "^", "ms": 6, "color": AFTER, "markerfacecolor": AFTER if certain else "white"}
        rows = [(*law.path_kl, *law.reward_gain) for law in laws if law.trusted is certain]
        _points(axes, rows, **style, **({"label": "fine-tuned and weighted"} if certain else {}))


def _words_by_weights(laws: Sequence[Reweighted]) -> str:
    """What the triangles are, for the caption."""
    if not laws:
        return ""
    ends = " to ".join(f"{law.kl_weight:.3g}" for law in (laws[0], laws[-1]))
    return (
        f"Triangles are the trained chain's own samples, weighted for KL weights from {ends}: one run, and the laws "
        "around it; hollow, on a dashed line, where too few samples are effective to trust them. "
    )


def tangent_curve(pretrained: float, bounds: Sequence[Bound], kl: np.ndarray) -> np.ndarray:
    """The frontier at `kl`: piecewise cubic in s = √(2 KL), with dR/ds = β·s at every bound; NaN beyond the last.

    Args:
        pretrained: reward at KL 0.
        bounds: by increasing KL > 0.
        kl: where to draw it, in nats.
    """
    s = np.sqrt(2 * kl)
    knots = np.array([0.0, *(np.sqrt(2 * b.path_kl) for b in bounds)])
    values = np.array([pretrained, *(b.reward for b in bounds)])
    slopes = np.array([0.0, *(b.beta * knot for b, knot in zip(bounds, knots[1:]))])
    slopes[0] = 2 * (values[1] - values[0]) / knots[1] - slopes[1]  # a parabola in the first piece
    piece = np.clip(np.searchsorted(knots, s, side="right") - 1, 0, len(bounds) - 1)
    width = knots[piece + 1] - knots[piece]
    t = (s - knots[piece]) / width
    left, right = values[piece], values[piece + 1]
    curve = (
        left * (1 + 2 * t) * (1 - t) ** 2
        + right * t**2 * (3 - 2 * t)
        + width * (slopes[piece] * t * (1 - t) ** 2 - slopes[piece + 1] * t**2 * (1 - t))
    )
    return np.where(s <= knots[-1], curve, np.nan)


def _path_kl(b: Bound) -> float:
    return b.path_kl


def _points(axes: Any, rows: list[tuple[float, float, float, float]], **style: Any) -> None:
    """Markers at (x, y) with bars of two standard errors; rows are (x, its error, y, its error)."""
    if not rows:
        return
    x, x_se, y, y_se = np.array(rows).T
    edge = {"markeredgecolor": "white"} if "markerfacecolor" not in style else {}
    axes.errorbar(x, y, xerr=2 * x_se, yerr=2 * y_se, elinewidth=1.3, capsize=0, zorder=5, **edge, **style)


def _few_ticks() -> Any:
    require("matplotlib")
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, integer=True)
