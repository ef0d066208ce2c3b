"""What became of each of several rewards: a picture of their course, and tables of the plan and of the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicit_diffusion.commands.finetune.report.figures import canvas
from implicit_diffusion.commands.finetune.report.plan_table import gained
from implicit_diffusion.commands.finetune.result import Result
from implicit_diffusion.commands.shared.drawing import INK, in_legend, legend_above
from implicit_diffusion.commands.shared.formatting import distinct, number, percent
from implicit_diffusion.commands.shared.page import table
from implicit_diffusion.runs.callbacks.held_out import each_reward

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7d838c")  # Okabe and Ito


def rewards(result: Result) -> tuple[Any, str, str] | None:
    """The gain of each reward on held-out noise, in its deviations, beside what is expected; None of a single one."""
    several = result.summary.rewards
    if len(several) < 2:
        return None
    figure = canvas(3.9)
    axes = figure.subplots()
    axes.axhline(0.0, color=INK, lw=0.8)
    end = result.summary.training.updates
    before = result.summary.training.held_out_rewards_before
    bars = {"elinewidth": 1.3, "markeredgecolor": "white", "zorder": 4}
    for place, (each, start, colour) in enumerate(zip(several, before, COLOURS)):
        seen = result.column("updates", f"held_out_{each_reward(each.name)}")
        x, y = np.array([(0.0, start), *seen]).T
        axes.plot(x, (y - start) / each.deviation, "o-", ms=3.5, color=colour, lw=1.4, label=in_legend(each.name))
        aside = end * (1.03 + 0.012 * place)  # so that bars of the same height can be told apart
        gain, error = (value / each.deviation for value in each.gain)
        axes.errorbar(aside, gain, 2 * error, fmt="D", ms=6.5, color=colour, **bars)
        if each.expected is not None:
            best, error = (value / each.deviation for value in each.expected)
            axes.errorbar(1.1 * aside, best, 2 * error, fmt="*", ms=11, color=colour, **bars)
    axes.set(xlabel="updates", ylabel="gain (standard deviations)")
    legend_above(axes, columns=2)
    caption = (
        "The gain of each reward over the pretrained model on the same held-out noise, in standard deviations of the "
        "pretrained samples. Diamonds are the fine-tuned model, judged at the end on more noise"
    )
    if any(each.expected is not None for each in several):
        caption += (
            "; stars are the law that is best for their weighted sum at this KL weight, which may give one reward up "
            "for another"
        )
    return figure, "What became of each reward", f"{caption}. Bars are ± 2 standard errors."


def rewards_at_the_end(result: Result) -> str:
    """The section with a row for each of several rewards; empty for a single one."""
    several = result.summary.rewards
    if len(several) < 2:
        return ""
    columns = ("", "weight", "deviation", "before", "after", "gain", "in deviations", "best for the sum", "captured")
    rows = [
        [
            each.name,
            f"{each.weight:g}".replace("-", "−"),
            number(each.deviation),
            number(*each.before),
            number(*each.after),
            number(*each.gain, sign=True),
            number(each.gain_in_std, sign=True, digits=2),
            number(*(each.expected or (None,)), sign=True),
            percent(*(each.captured or (None, None))),
            number(*each.exported),
        ]
        for each in several
    ]
    return f"""<section><h2>Each reward</h2>
<p>What is raised is their sum, each times its weight and divided by its standard deviation between pretrained samples:
“reward” on this page, in deviations. “Best for the sum” is what each would gain under the best law for that sum at this
KL weight, and “captured” is the share of it. Other numbers are in the units of each reward.</p>
{table((*columns, "exported"), rows)}</section>
"""


def rewards_of_the_plan(result: Result) -> str:
    """A table of what each of several rewards gains at each KL weight of the plan; empty for a single one."""
    plan, names = result.plan, [each.name for each in result.summary.rewards]
    if not plan.rewards or not plan.bounds:
        return ""
    rows = [["pretrained", *(number(each.reward, each.reward_se) for each in plan.rewards)]]
    for place, weight in enumerate(distinct([b.beta for b in plan.bounds], 3)):
        rows.append([weight, *(gained(each, place) for each in plan.rewards)])
    return f"""<p>Of each reward, this gains, in its own units and, in brackets, in deviations:</p>
{table(("KL weight", *names), rows)}"""
