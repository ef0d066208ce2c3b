"""summary.json of a sweep, as a type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from implicit_diffusion.commands.finetune.summary import Headline, Summary
from implicit_diffusion.commands.shared.summaries import to_json
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.evaluation.chains import Estimate


@dataclass(frozen=True)
class SweepRow:
    """The headline of one run.

    Args:
        kl_weight: β of the run.
        run: name of its folder.
        updates: that were made.
        seconds: of the training.
        stopped: why the run stopped early; None where it did not.
        held_out_reward_before: mean reward of the pretrained chain on the noise of the held-out checks.
        headline: what the judgement says.
    """

    kl_weight: float
    run: str
    updates: int
    seconds: float
    stopped: str | None
    held_out_reward_before: float
    headline: Headline

    @staticmethod
    def of(summary: Summary, beta: float, run: str) -> SweepRow:
        """The row of a run."""
        training = summary.training
        return SweepRow(
            kl_weight=beta,
            run=run,
            updates=training.updates,
            seconds=training.seconds,
            stopped=training.stopped,
            held_out_reward_before=training.held_out_reward_before,
            headline=summary.headline,
        )

    def to_json(self) -> dict[str, Any]:
        """One flat mapping; estimates as two numbers."""
        row: dict[str, Any] = to_json(self)
        return row | row.pop("headline")


@dataclass(frozen=True)
class FrontierPoint:
    """The optimum for one β, by the plan."""

    kl_weight: float
    reward: float
    reward_se: float
    path_kl: float
    path_kl_se: float
    trusted: bool

    @staticmethod
    def of(bound: Bound) -> FrontierPoint:
        """The point of a bound."""
        return FrontierPoint(bound.beta, bound.reward, bound.reward_se, bound.path_kl, bound.path_kl_se, bound.trusted)


@dataclass(frozen=True)
class SweepSummary:
    """All of summary.json.

    Args:
        reward: name of the reward.
        reward_pretrained: mean reward of the pretrained samples.
        rows: one per finished run, in increasing order of β.
        frontier: the best possible reward and path KL per β, in decreasing order of β.
    """

    reward: str
    reward_pretrained: Estimate
    rows: list[SweepRow]
    frontier: list[FrontierPoint]

    def to_json(self) -> dict[str, Any]:
        """As `to_json` writes it, except that the rows are flat."""
        content: dict[str, Any] = to_json(self)
        return content | {"rows": [row.to_json() for row in self.rows]}
