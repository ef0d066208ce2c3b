"""What the judges say: their curves beside the reward's, the same noise through the run, and a table of the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_diffusion.commands.finetune.report.figures import AFTER, WIDTH, canvas
from implicit_diffusion.commands.finetune.report.rewards import COLOURS
from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.shared.drawing import INK, legend_above
from implicit_diffusion.commands.shared.formatting import number
from implicit_diffusion.commands.shared.page import table


def judges(result: Result) -> tuple[Any, str, str] | None:
    """The change of reward and judges on held-out noise, in deviations; None without a judge."""
    summary = result.summary
    if not summary.judges:
        return None
    figure = canvas(3.9)
    axes = figure.subplots()
    axes.axhline(0.0, color=INK, lw=0.8)
    end, bars = summary.training.updates, {"elinewidth": 1.3, "zorder": 4}
    start, std = summary.training.held_out_reward_before, summary.headline.reward_std_before
    rewards = [(0.0, start), *result.column("updates", "held_out_reward")]
    x, y = np.array(rewards).T
    axes.plot(x, (y - start) / std, color=AFTER, lw=2.0, label="the reward")
    gain, error = (value / std for value in summary.headline.reward_gain)
    axes.errorbar(1.03 * end, gain, 2 * error, fmt="D", ms=6.5, color=AFTER, **bars)
    for place, (each, colour) in enumerate(zip(summary.judges, COLOURS[1:])):
        unit = each.deviation or 1.0
        looks = [(0.0, 0.0, 0.0), *((look.updates, look.change, look.se) for look in each.course)]
        x, y, error = np.array(looks).T
        label = "judge " + each.name.replace("$", r"\$")
        axes.errorbar(x, y / unit, 2 * error / unit, fmt="o--", ms=3.5, color=colour, lw=1.4, label=label)
        change, error = (value / unit for value in each.change)
        axes.errorbar(end * (1.045 + 0.015 * place), change, 2 * error, fmt="D", ms=6.5, color=colour, **bars)
    axes.set(xlabel="updates", ylabel="change (standard deviations)")
    legend_above(axes, columns=2)
    caption = (
        "The change from the pretrained model on the same held-out noise, in standard deviations of the pretrained "
        "samples. The judges were never raised: where one falls while the reward rises, the reward may be hacked. "
        "Diamonds are the judgement at the end, on more noise. Bars are ± 2 standard errors."
    )
    return figure, "What the judges say", caption


def course(result: Result) -> tuple[Any, str, str] | None:
    """Images of the same noise through the run; None where none were stored."""
    if not result.course:
        return None
    looks = list(result.course.items())
    rows, height, width = len(looks[0][1]), *looks[0][1].shape[-2:]
    tile = WIDTH / len(looks)
    header = 0.22
    total = header + rows * tile * height / width
    figure = canvas(total)
    figure.set_layout_engine("none")
    grid = figure.add_gridspec(
        rows, len(looks), wspace=0.06, hspace=0.06, left=0, right=1, bottom=0, top=1 - header / total
    )
    for column, (updates, images) in enumerate(looks):
        for row, image in enumerate(images):
            axes = figure.add_subplot(grid[row, column])
            pixels = image.permute(1, 2, 0) if len(image) == 3 else image.float().mean(0)
            axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(str(updates), fontsize=8.5, loc="center", pad=3)
    caption = (
        "Each row is the same held-out noise, and each column the model after so many updates, as the numbers say. "
        f"These are the first {rows} draws on which the judges were asked, not chosen ones."
    )
    return figure, "The same noise through the run", caption


def judges_at_the_end(result: Result) -> str:
    """The section with a row for each judge; empty without one."""
    rows = [
        [
            each.name,
            number(*each.before),
            number(*each.after),
            number(*each.change, sign=True),
            number(each.change_in_std, sign=True, digits=2),
            number(*each.exported),
            str(each.best_update),
            "–" if each.warned is None else str(each.warned),
        ]
        for each in result.summary.judges
    ]
    if not rows:
        return ""
    columns = (
        "",
        "before",
        "after",
        "change",
        "in deviations",
        "exported",
        "highest after",
        "warned after",
    )
    return f"""<section><h2>Each judge</h2>
<p>Judges were measured on the samples of every check, and never raised. “Highest” and “warned” count updates.</p>
{table(columns, rows)}</section>
"""
