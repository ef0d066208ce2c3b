"""What a chain is worth, what tilting could gain, and how much of that a training has captured."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.evaluation.bounds import Bound, bound, most_kl, sharpest
    from implicit_diffusion.evaluation.cache import evaluate_pretrained
    from implicit_diffusion.evaluation.chains import Estimate, Evaluation, evaluate, mean_and_error, weighed
    from implicit_diffusion.evaluation.clipping import ClippingEffect, effect_of_clipping
    from implicit_diffusion.evaluation.each_reward import RewardJudgement, RewardPlan, judge_rewards
    from implicit_diffusion.evaluation.gains import (
        Reweighted,
        captured,
        captured_by_weights,
        gain,
        gain_of_j,
        memory_of_start,
        possible,
        reweighted,
    )
    from implicit_diffusion.evaluation.independence import Draws, metropolis
    from implicit_diffusion.evaluation.judging import Judgement, Untrained, judge
    from implicit_diffusion.evaluation.plans import Plan, PlanRow, make_plan
    from implicit_diffusion.evaluation.sequential import Steered, sequential_monte_carlo
    from implicit_diffusion.evaluation.stored import Stored
    from implicit_diffusion.evaluation.tilting import TiltedLaw, tilted_law
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Bound",
    "ClippingEffect",
    "Draws",
    "Estimate",
    "Evaluation",
    "Judgement",
    "Plan",
    "PlanRow",
    "RewardJudgement",
    "RewardPlan",
    "Reweighted",
    "Steered",
    "Stored",
    "TiltedLaw",
    "Untrained",
    "bound",
    "captured",
    "captured_by_weights",
    "effect_of_clipping",
    "evaluate",
    "evaluate_pretrained",
    "gain",
    "gain_of_j",
    "judge",
    "judge_rewards",
    "make_plan",
    "mean_and_error",
    "memory_of_start",
    "metropolis",
    "most_kl",
    "possible",
    "reweighted",
    "sequential_monte_carlo",
    "sharpest",
    "tilted_law",
    "weighed",
]
