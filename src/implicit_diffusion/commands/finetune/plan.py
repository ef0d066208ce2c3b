"""The plan before the run: what each KL weight β can buy, from pretrained samples alone.

A few trajectories from each of many x_0, scored once, give for every β the reward gain and the path KL of the tilted
law dP* ∝ e^{R/β} dP_0, which no fine-tuning can beat in J = −E R + β·KL (`implicit_diffusion.evaluation.bounds`), and
tell how far the chain is from memoryless. For a Gaussian reward of standard deviation σ the gain is σ²/β: the β on
offer are those that would buy round numbers of σ.

Where samples come under prompts or class labels, these are no sampler's choice: the bound is then the one given the
start (x_0 and its prompt), and σ the deviation between samples of one start.

A penalty that is no KL has no bound: its plan says only what the pretrained chain earns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.shared.formatting import distinct, number, percent
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import Bound, bound, gain, gain_of_j, memory_of_start
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.extras import require
from implicit_diffusion.runs.clock import part
from implicit_diffusion.showing import Shown, brief, with_error

GAINS = (0.25, 0.5, 1.0, 1.5, 2.0)  # in standard deviations of the pretrained reward


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What β buys.

    Args:
        reward: E R of the pretrained chain, with its standard error; `reward_std` is the deviation between samples.
        bounds: the optimum for each β, the weakest tilt first; the unconditional bound, which is never too pessimistic
            and tight where `memory` is small, or the one given the start; none where the penalty is no KL.
        gain_se: standard error of each bound's gain of reward.
        j_gain_se: that of each bound's gain of J; none in a plan of an earlier version.
        memory: share of the reward's variance that x_0 decides, with its standard error; 0 for a memoryless chain.
        conditional: whether the bounds are given the start.
    """

    reward: float
    reward_se: float
    reward_std: float
    bounds: tuple[Bound, ...]
    gain_se: tuple[float, ...]
    memory: float
    memory_se: float
    conditional: bool = False
    j_gain_se: tuple[float, ...] = ()

    def _words(self) -> Iterable[str]:
        yield f"reward={with_error(self.reward, self.reward_se)}"
        yield f"reward_std={self.reward_std:.3g}"
        yield f"betas={brief([b.beta for b in self.bounds])}"
        yield f"memory={with_error(self.memory, self.memory_se)}"

    def rows(self) -> list[dict[str, Any]]:
        """The table: one row per β, gains relative to the pretrained chain, J in units of reward."""
        return [
            {
                "kl_weight": b.beta,
                "reward_gain": b.reward - self.reward,
                "reward_gain_se": gain_se,
                "reward_gain_in_std": (b.reward - self.reward) / self.reward_std,
                "path_kl": b.path_kl,
                "path_kl_se": b.path_kl_se,
                "j_gain": -self.reward - b.j,
                "j_gain_se": j_gain_se,
                "effective_samples": b.effective_samples,
                "trusted": b.trusted,
            }
            for b, gain_se, j_gain_se in zip_longest(self.bounds, self.gain_se, self.j_gain_se)
        ]

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "reward": self.reward,
            "reward_se": self.reward_se,
            "reward_std": self.reward_std,
            "memory": self.memory,
            "memory_se": self.memory_se,
            "rows": self.rows(),
        }


@part("planning")
def make_plan(
    evaluation: Evaluation,
    betas: Sequence[float] | None = None,
    *,
    asked: float | None = None,
    conditional: bool = False,
) -> Plan:
    """The plan from trajectories of the pretrained chain, several per start.

    Args:
        evaluation: of the pretrained chain; 256 starts with 16 repeats resolve a gain of two deviations.
        betas: KL weights to try; by default those of `GAINS`. An empty list asks for the reward's statistics alone.
        asked: a further KL weight.
        conditional: given the start; for chains under a condition.

    Raises:
        InvalidInputError: a reward that does not vary over the samples: nothing can be tilted.
    """
    reward, reward_se = mean_and_error(evaluation.reward)
    values = evaluation.reward.double()
    std = (values.var(1).mean().sqrt() if conditional else values.std()).item()
    if not std > 0:
        raise InvalidInputError(f"reward is {reward:g} for every pretrained sample; fine-tuning needs one that varies")
    tried = [std / share for share in GAINS] if betas is None else betas
    chosen = sorted({*tried, *([asked] if asked else [])}, reverse=True)
    memory, memory_se = memory_of_start(evaluation.reward)
    bounds = [bound(evaluation, beta, conditional=False) for beta in chosen]
    if conditional:  # of rewards less their start's mean: a tilt given the start shifts with it
        centred = replace(evaluation, reward=evaluation.reward - evaluation.reward.mean(1, keepdim=True))
        found = [bound(centred, beta) for beta in chosen]
        bounds = [replace(b, reward=b.reward + reward, j=b.j - reward) for b in found]
    gain_se, j_gain_se = (
        tuple(of(evaluation, beta, conditional=conditional)[1] for beta in chosen) for of in (gain, gain_of_j)
    )
    return Plan(reward, reward_se, std, tuple(bounds), gain_se, memory, memory_se, conditional, j_gain_se)


def show(plan: Plan) -> None:
    """Print the plan as a table, or in a line where it has no bounds."""
    require("rich")
    from rich.console import Console
    from rich.table import Table

    earns = f"pretrained reward {number(plan.reward, plan.reward_se)}"
    earns += f", deviation between samples {number(plan.reward_std)}"
    if not plan.bounds:
        print(earns)
        return
    decides = "x_0 and its condition decide" if plan.conditional else "x_0 decides"
    table = Table(
        title=f"What the KL weight buys ({earns})",
        caption=f"Best possible, not yet what N steps attain. {decides} {percent(plan.memory, plan.memory_se)} of the "
        "reward's variance (0 % = memoryless). A '?' marks numbers that rest on too few effective samples.",
    )
    for column in ("--kl-weight", "reward gain", "in deviations", "path KL (nats)", "gain of J"):
        table.add_column(column, justify="right")
    rows = plan.rows()
    for weight, row in zip(distinct([row["kl_weight"] for row in rows], 3), rows):
        mark = " ?" if not row["trusted"] else ""
        table.add_row(
            weight,
            number(row["reward_gain"], row["reward_gain_se"], sign=True) + mark,
            f"{row['reward_gain_in_std']:.2f}",
            number(row["path_kl"], row["path_kl_se"]) + mark,
            number(row["j_gain"], row["j_gain_se"]),
        )
    Console().print(table)


@part("planning")
def plot(plan: Plan, evaluation: Evaluation, path: Path) -> None:
    """Two panels: the frontier of reward against path KL, and the pretrained rewards that it is made of."""
    from implicit_diffusion.commands.shared.drawing import finish, legend_above, sheet

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
    left.set(xlabel="path KL to the pretrained chain (nats)", ylabel="expected reward", title="What can be had")
    right.hist(evaluation.reward.flatten().cpu().numpy(), bins=40, color="0.6")
    right.axvline(plan.reward, color="k", label="mean")
    for b in plan.bounds:
        right.axvline(b.reward, color="C0", alpha=0.5, lw=1)
    right.plot([], [], color="C0", alpha=0.5, label="tilted means, by β")
    right.set(xlabel="reward", ylabel="pretrained samples", title="Where the pretrained samples lie")
    for axis in (left, right):
        legend_above(axis, columns=2)
    finish(figure, path, (left, right))
