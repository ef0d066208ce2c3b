"""The plan before the run: what each KL weight β can buy, from pretrained samples alone.

A few trajectories from each of many x_0, scored once, give for every β the reward gain and the path KL of the tilted
law dP* ∝ e^{R/β} dP_0, which no fine-tuning can beat in J = −E R + β·KL (`implicit_diffusion.loops.bound`), and tell
how far the chain is from memoryless. For a Gaussian reward of standard deviation σ the gain is σ²/β: the β on offer are
those that would buy round numbers of σ.

Where samples come under prompts or class labels, these are no sampler's choice: the bound is then the one given the
start (x_0 and its prompt), and σ the deviation between samples of one start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import Evaluation
from implicit_diffusion.loops.bound import Bound, bound, memory_of_start
from implicit_diffusion.loops.evaluation import mean_and_error

GAINS = (0.25, 0.5, 1.0, 1.5, 2.0)  # in standard deviations of the pretrained reward


@dataclass(frozen=True)
class Plan:
    """What β buys.

    Args:
        reward: E R of the pretrained chain, with its standard error; `reward_std` is the deviation between samples.
        bounds: the optimum for each β, the weakest tilt first; the unconditional bound, which is never too pessimistic
            and tight where `memory` is small, or the one given the start.
        memory: share of the reward's variance that x_0 decides, with its standard error; 0 for a memoryless chain.
        conditional: whether the bounds are given the start; `reward_se` of a bound is then that of the gain, which the
            spread between prompts does not enter.
    """

    reward: float
    reward_se: float
    reward_std: float
    bounds: tuple[Bound, ...]
    memory: float
    memory_se: float
    conditional: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """The table: one row per β, gains relative to the pretrained chain, J in units of reward."""
        return [
            {
                "kl_weight": b.beta,
                "reward_gain": b.reward - self.reward,
                "reward_gain_se": b.reward_se if self.conditional else math.hypot(b.reward_se, self.reward_se),
                "reward_gain_in_std": (b.reward - self.reward) / self.reward_std,
                "path_kl": b.path_kl,
                "path_kl_se": b.path_kl_se,
                "j_gain": -self.reward - b.j,
                "effective_samples": b.effective_samples,
                "trusted": b.trusted,
            }
            for b in self.bounds
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


def make_plan(evaluation: Evaluation, betas: Sequence[float] | None = None, *, conditional: bool = False) -> Plan:
    """The plan from trajectories of the pretrained chain, several per start.

    Args:
        evaluation: of the pretrained chain; 256 starts with 16 repeats resolve a gain of two deviations.
        betas: KL weights to try; by default those of `GAINS`.
        conditional: given the start; for chains under a condition.

    Raises:
        InvalidInputError: a reward that does not vary over the samples: nothing can be tilted.
    """
    reward, reward_se = mean_and_error(evaluation.reward)
    values = evaluation.reward.double()
    std = (values.var(1).mean().sqrt() if conditional else values.std()).item()
    if not std > 0:
        raise InvalidInputError(f"reward is {reward:g} for every pretrained sample; fine-tuning needs one that varies")
    chosen = sorted(betas or (std / gain for gain in GAINS), reverse=True)
    memory, memory_se = memory_of_start(evaluation.reward)
    bounds = [bound(evaluation, beta, conditional=False) for beta in chosen]
    if conditional:  # of rewards less their start's mean: a tilt given the start shifts with it
        centred = replace(evaluation, reward=evaluation.reward - evaluation.reward.mean(1, keepdim=True))
        found = [bound(centred, beta) for beta in chosen]
        bounds = [replace(b, reward=b.reward + reward, j=b.j - reward) for b in found]
    return Plan(reward, reward_se, std, tuple(bounds), memory, memory_se, conditional)


def show(plan: Plan, unit: str = "") -> None:
    """Print the plan as a table."""
    from rich.console import Console
    from rich.table import Table

    decides = "x_0 and its condition decide" if plan.conditional else "x_0 decides"
    table = Table(
        title=f"What the KL weight buys (pretrained reward {plan.reward:.4g} ± {plan.reward_se:.1g}{unit}, "
        f"deviation between samples {plan.reward_std:.3g})",
        caption=f"Best possible, not yet what N steps attain. {decides} {100 * plan.memory:.1f} ± "
        f"{100 * plan.memory_se:.1f} % of the reward's variance (0 % = memoryless). A '?' marks numbers that rest on "
        "too few effective samples.",
    )
    for column in ("--kl-weight", "reward gain", "in deviations", "path KL (nats)", "gain of J"):
        table.add_column(column, justify="right")
    for row in plan.rows():
        mark = " ?" if not row["trusted"] else ""
        table.add_row(
            f"{row['kl_weight']:.3g}",
            f"{row['reward_gain']:+.3g} ± {row['reward_gain_se']:.1g}{mark}",
            f"{row['reward_gain_in_std']:.2f}",
            f"{row['path_kl']:.2f} ± {row['path_kl_se']:.1g}{mark}",
            f"{row['j_gain']:.3g}",
        )
    Console().print(table)


def plot(plan: Plan, evaluation: Evaluation, path: Path) -> None:
    """Two panels: the frontier of reward against path KL, and the pretrained rewards that it is made of."""
    from implicit_diffusion.experiments.drawing import finish, sheet

    figure = sheet(10, 4)
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
    left.legend(loc="lower right")
    right.hist(evaluation.reward.flatten().cpu().numpy(), bins=40, color="0.6")
    right.axvline(plan.reward, color="k", label="mean")
    for b in plan.bounds:
        right.axvline(b.reward, color="C0", alpha=0.5, lw=1)
    right.plot([], [], color="C0", alpha=0.5, label="tilted means, by β")
    right.set(xlabel="reward", ylabel="pretrained samples", title="Where the pretrained samples lie")
    right.legend()
    finish(figure, path, (left, right))
