"""A plan as a table on the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from implicit_diffusion.commands.shared.formatting import distinct, number, percent
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.each_reward import RewardPlan
from implicit_diffusion.evaluation.plans import Plan
from implicit_diffusion.extras import require
from implicit_diffusion.runs.clock import part


def show(plan: Plan, rewards: Sequence[str] = ()) -> None:
    """Print the plan as a table, or in a line where it has no bounds; of several rewards, what is gained of each.

    Args:
        plan: of a run.
        rewards: the names of several rewards.
    """
    require("rich")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    statistics = f"pretrained reward {number(plan.reward, plan.reward_se)}{' in deviations' * bool(plan.rewards)}"
    statistics += f", deviation between samples {number(plan.reward_std)}"
    if not plan.bounds:
        print(statistics)
        return
    start = "x_0 and its condition decide" if plan.conditional else "x_0 decides"
    table = Table(
        title=f"What the KL weight buys ({statistics})",
        caption=f"Best possible, not yet what N steps attain. {start} "
        f"{percent(plan.memory_of_start, plan.memory_of_start_se)} of the "
        "reward's variance (0 % = memoryless). A '?' marks numbers that rest on too few effective samples.",
    )
    for column in ("--kl-weight", "reward gain", "in deviations", "path KL (nats)", "gain of J"):
        table.add_column(column, justify="right")
    rows = plan.rows()
    for weight, row in zip(distinct([row.kl_weight for row in rows], 3), rows):
        mark = "" if row.trusted else " ?"
        table.add_row(
            weight,
            number(row.reward_gain, row.reward_gain_se, sign=True) + mark,
            f"{row.reward_gain_in_std:.2f}",
            number(row.path_kl, row.path_kl_se) + mark,
            number(row.j_gain, row.j_gain_se),
        )
    Console().print(table)
    if not plan.rewards:
        return
    several = Table(
        title="What of each reward is gained at the optimum of their weighted sum, in its own units and in deviations"
    )
    several.add_column("--kl-weight", justify="right")
    for name in rewards:
        several.add_column(Text(name), justify="right")
    several.add_row("pretrained", *(number(each.reward, each.reward_se) for each in plan.rewards))
    for place, weight in enumerate(distinct([row.kl_weight for row in rows], 3)):
        several.add_row(weight, *(gained(each, place) for each in plan.rewards))
    Console().print(several)


def gained(reward: RewardPlan, place: int) -> str:
    """The gain of one of several rewards at a KL weight of the plan, by its place, also in deviations."""
    gain, error = reward.gain[place], reward.gain_se[place]
    return f"{number(gain, error, sign=True)} ({number(gain / reward.reward_std, sign=True, digits=2)})"


@part("planning")
def plot(plan: Plan, evaluation: Evaluation, path: Path) -> None:
    """Draw two panels: the frontier of reward against path KL, and the pretrained rewards that it is made of."""
    from implicit_diffusion.commands.shared.drawing import finish_figure, legend_above, sheet

    figure = sheet(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    left.errorbar(
        [b.path_kl for b in plan.bounds],
        [b.reward for b in plan.bounds],
        xerr=[2 * b.path_kl_se for b in plan.bounds],
        yerr=[2 * b.reward_se for b in plan.bounds],
        fmt="o-",
        capsize=2,
        label="optimal path law, ± 2 s.e.",
    )
    left.plot([0], [plan.reward], "ks", label="pretrained")
    for b in plan.bounds:
        left.annotate(
            f"β = {b.beta:.3g}",
            (b.path_kl, b.reward),
            xytext=(6, -10),
            textcoords="offset points",
            fontsize=8,
        )
    left.set(xlabel="path KL to the pretrained chain (nats)", ylabel="expected reward", title="What can be reached")
    right.hist(evaluation.reward.flatten().cpu().numpy(), bins=40, color="0.6")
    right.axvline(plan.reward, color="k", label="mean")
    for b in plan.bounds:
        right.axvline(b.reward, color="C0", alpha=0.5, lw=1)
    right.plot([], [], color="C0", alpha=0.5, label="tilted means, by β")
    right.set(xlabel="reward", ylabel="pretrained samples", title="Where the pretrained samples lie")
    for axis in (left, right):
        legend_above(axis, columns=2)
    finish_figure(figure, path, (left, right))
