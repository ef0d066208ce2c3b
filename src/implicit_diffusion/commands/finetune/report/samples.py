"""What the samples look like, what rewards they earn, and whether they earn them honestly."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from implicit_diffusion.commands.finetune.report.figures import AFTER, BEFORE, EXPORTED, REAL, WIDTH, canvas
from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.shared.drawing import FAINT, INK, legend_above
from implicit_diffusion.commands.shared.formatting import decimals
from implicit_diffusion.digits import Appearance, Quality

COLUMNS, ROWS = 4, 5
Series = tuple[Appearance, str, str]  # numbers of a set of images, with their colour and marker


def samples(result: Result) -> tuple[Any, str, str] | None:
    """Pairs of images from the same noise, each with its reward; or points of the plane before and after."""
    if result.points is not None:
        return _points(*result.points)
    if result.images is None:
        return None
    before, after = result.images
    count = min(COLUMNS * ROWS, len(before), len(after))
    rows = -(-count // COLUMNS)
    height, width = before.shape[-2:]
    ratios = ([1, 0.05, 1, 0.25] * COLUMNS)[:-1]
    tile = WIDTH / sum(ratios) * height / width  # inches high
    label, header = 0.24, 0.22
    total = header + rows * (tile + label)
    figure = canvas(total)
    figure.set_layout_engine("none")  # forty tiles are placed faster by hand
    edges = {"left": 0, "right": 1, "top": 1 - header / total, "bottom": label / total}
    grid = figure.add_gridspec(rows, len(ratios), width_ratios=ratios, wspace=0, hspace=label / tile, **edges)
    places = decimals(result.plan.reward_std)
    for index in range(count):
        row, column = divmod(index, COLUMNS)
        sides = (before, result.before, BEFORE), (after, result.after, AFTER)
        for side, (images, evaluation, colour) in enumerate(sides):
            axes = figure.add_subplot(grid[row, 4 * column + 2 * side])
            axes.imshow(_pixels(images[index]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            reward = f"{evaluation.reward[index, 0]:.{places}f}".replace("-", "−")
            axes.set_xlabel(reward, fontsize=8.5, color=colour, labelpad=2, fontweight="bold" if side else "normal")
            if row == 0:
                axes.set_title(("before", "after")[side], fontsize=8.5, color=colour, loc="center", pad=3)
    channels = before.shape[1]
    shown = "" if channels in (1, 3) else f" Shown is the mean over the {channels} channels."
    caption = (
        f"Each pair starts from the same noise: the pretrained model on the left, the fine-tuned one on the right, its "
        f"reward below. These are the first {count} draws of held-out noise, not chosen ones; pixels are cut off at "
        f"[−1, 1].{shown}"
    )
    return figure, "The same noise, before and after", caption


def _points(before: Tensor, after: Tensor) -> tuple[Any, str, str]:
    figure = canvas(2.8)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, title, colour, x in zip(axes, ("before", "after"), (BEFORE, AFTER), (before, after)):
        panel.scatter(*x.cpu().T, s=3, lw=0, color=colour)
        panel.set(title=title, xlabel="$x_1$", aspect="equal")
    axes[0].set_ylabel("$x_2$")
    caption = (
        f"{len(before)} draws from the same held-out noise: the pretrained model on the left, the fine-tuned one on "
        "the right, with the same axes."
    )
    return figure, "The same noise, before and after", caption


def _pixels(x: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] to (H, W) or (H, W, 3) in [0, 1]."""
    image = (x.float().cpu() / 2 + 0.5).clamp(0, 1)
    return (image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)).numpy()


def hacking(result: Result) -> tuple[Any, str, str] | None:
    """Distribution of the reward; for digits also what a classifier says that was not optimised against."""
    before, after, exported = (getattr(result.summary, f"quality_{when}") for when in ("before", "after", "exported"))
    caption = (
        f"Rewards of {result.before.reward.numel()} pretrained and {result.after.reward.numel()} fine-tuned samples "
        "from the same held-out noise; lines mark the means."
    )
    if before is None or after is None:
        figure = canvas(2.7)
        _rewards(figure.subplots(), result)
        return figure, "What the samples earn", caption
    figure = canvas(8.3)
    figure.get_layout_engine().set(hspace=0.05)
    grid = figure.add_gridspec(4, 2, height_ratios=[2.0, 1.8, 2.2, 0.9])
    first = figure.add_subplot(grid[0, :])
    _rewards(first, result)
    first.set_title("What the samples earn")
    _classes(figure.add_subplot(grid[1, :]), before, after, len(result.before.reward))
    series: dict[str, Series] = {"real, held out": (before.held_out, REAL, "D"), "before": (before, BEFORE, "o")}
    series["after"] = after, AFTER, "o"
    if exported is not None:
        series["exported"] = exported, EXPORTED, "X"
    shares = {
        "classifier's\nconfidence": "classifier_confidence",
        "second classifier's\nconfidence": "judge_confidence",
    }
    shares |= {"the two\nagree": "judge_agreement", "copies of\ntraining data": "memorised"}
    axes = figure.add_subplot(grid[2, :])
    _dots(axes, series, shares, scale=100.0)
    axes.set(xlabel="per cent", xlim=(-3, 103))
    axes.set_title("Is it still a digit?")
    legend_above(axes, columns=len(series))
    mmd, distance = figure.add_subplot(grid[3, 0]), figure.add_subplot(grid[3, 1])
    reference = after.mmd_reference
    mmd.axvspan(min(0.0, reference.mean), reference.quantile_95, color=REAL, alpha=0.25, lw=0)
    mmd.axvline(reference.quantile_95, color=REAL, lw=1.2)
    _dots(mmd, {name: one for name, one in series.items() if name != "real, held out"}, {"": "mmd"})
    mmd.set(xlabel="MMD² to real digits")
    mmd.set_xlim(left=min(0.0, *mmd.get_xlim()))
    mmd.locator_params(axis="x", nbins=4)
    _dots(distance, series, {"": "nearest_distance"})
    distance.set(xlabel="distance to nearest digit")
    distance.set_xlim(left=0)
    distance.locator_params(axis="x", nbins=4)
    caption += (
        " Bars on the shares of digits are ± 2 standard errors. The classifier may have been optimised against, the "
        "second one (a support vector machine) never was: where only the first "
        "becomes more confident, the reward has been hacked. The green band is the MMD² of two random "
        "halves of the real digits; a reward that asks for rare digits moves the set out of it honestly. “Exported” is "
        "the model in model/, the trained network on all steps."
    )
    return figure, "Is the reward earned honestly?", caption


def _rewards(axes: Any, result: Result) -> None:
    both = [evaluation.reward.double().flatten().cpu().numpy() for evaluation in (result.before, result.after)]
    edges = np.histogram_bin_edges(np.concatenate(both), bins=48)
    top = 0.0
    for values, colour in zip(both, (BEFORE, AFTER)):
        heights, _, _ = axes.hist(values, edges, density=True, histtype="stepfilled", color=colour, alpha=0.28)
        axes.hist(values, edges, density=True, histtype="step", color=colour, lw=1.4)
        axes.axvline(values.mean(), color=colour, lw=1.4)
        top = max(top, heights.max())
    first, second = np.argsort([values.mean() for values in both])
    for which, side in ((first, "right"), (second, "left")):
        name, colour = (("before", BEFORE), ("after", AFTER))[which]
        offset = (-4 if side == "right" else 4, 0)
        place = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "top", "fontweight": "bold"}
        axes.annotate(name, (both[which].mean(), 1.14 * top), color=colour, fontsize=9, **place)
    axes.set(xlabel="reward", ylabel="density", ylim=(0, 1.18 * top))
    axes.set_yticks([])
    axes.grid(visible=False)


def _classes(axes: Any, before: Quality, after: Quality, count: int) -> None:
    """Shares of the digits among `count` samples, with bars of two standard errors."""
    digits = np.arange(10)
    for shift, name, colour, look in ((-0.2, "before", BEFORE, before), (0.2, "after", AFTER, after)):
        shares = np.array(look.class_histogram)
        error = 200 * np.sqrt(shares * (1 - shares) / count)  # two binomial standard errors, in per cent
        bars = {"ecolor": INK, "elinewidth": 0.9}
        axes.bar(digits + shift, 100 * shares, 0.38, yerr=error, error_kw=bars, color=colour, label=name)
    axes.axhline(10, color=INK, lw=1, ls=(0, (4, 3)), label="balanced")
    axes.grid(visible=False, axis="x")
    axes.set(title="Which digits are drawn", xticks=digits, xlabel="class, by the classifier", ylabel="per cent")
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(bottom=0)
    legend_above(axes, columns=3)


def _dots(axes: Any, series: dict[str, Series], rows: dict[str, str], scale: float = 1.0) -> None:
    """One line per number, one marker per source."""
    lines = np.arange(len(rows))
    for name, (look, colour, marker), shift in zip(series, series.values(), np.linspace(-0.24, 0.24, len(series))):
        values = [scale * getattr(look, key) for key in rows.values()]
        hollow = (
            {"markerfacecolor": "white", "markeredgewidth": 1.8} if name == "before" else {"markeredgecolor": "white"}
        )
        size = 7 if marker == "o" else 6.5
        axes.plot(values, lines + shift, marker, color=colour, ms=size, label=name, clip_on=False, zorder=3, **hollow)
    axes.set_yticks(list(lines), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for boundary in lines[1:]:
        axes.axhline(boundary - 0.5, color=FAINT, lw=0.8)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
