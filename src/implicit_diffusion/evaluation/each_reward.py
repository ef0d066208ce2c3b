r"""What becomes of each of several rewards when their weighted sum R = Σ_j c_j R_j is raised.

The law that attains J* tilts by R alone, dP* ∝ e^{R/β} dP_0, and the mean of every R_j moves with it: to

    E_{P*} R_j = E_0[R_j e^{R/β}] / E_0 e^{R/β}

from the same weighted trajectories as the bound. To first order that is a gain of Cov(R_j, R)/β, exactly so for
Gaussian rewards: a reward that is at odds with the others may be expected to fall, however large its weight.

The share captured of R_j is (E_θ R_j − E_0 R_j)/(E_{P*} R_j − E_0 R_j): how far it went of the way that the best law
for R would take it. It may exceed one, since J alone is bounded, not each R_j.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.evaluation.bounds import sharpest
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mean_and_error
from implicit_diffusion.evaluation.gains import gain, share_of
from implicit_diffusion.evaluation.judging import CLEAR, VAGUE
from implicit_diffusion.evaluation.soft_values import jackknife, log_weights_of
from implicit_diffusion.showing import Shown, with_error


@dataclass(frozen=True, repr=False)
class RewardPlan(Shown):
    """One of several rewards under the pretrained chain, and what of it is gained at each β.

    Args:
        reward: E R_j of the pretrained chain.
        reward_se: its standard error.
        reward_std: its standard deviation between samples; within a start where the plan is conditional.
        gain: E R_j under the tilted law of each bound of the plan, less E R_j of the pretrained chain.
        gain_se: the standard error of each gain.
    """

    reward: float
    reward_se: float
    reward_std: float
    gain: tuple[float, ...]
    gain_se: tuple[float, ...]

    def _words(self) -> Iterable[str]:
        yield f"reward={with_error(self.reward, self.reward_se)}"
        yield f"reward_std={self.reward_std:.3g}"


@dataclass(frozen=True, repr=False)
class RewardJudgement(Shown):
    """One of several rewards, or the only one, before and after a fine-tuning; each number with its standard error.

    Args:
        before: of the pretrained chain.
        after: of the trained chain.
        gain: the paired difference of the two.
        exported: of the exported pipeline.
        expected: what the law that attains J* gains over the pretrained chain; None where there is no J*.
        captured: gain/expected; None where nothing, within two standard errors, is expected, or the share is vague.
    """

    before: Estimate
    after: Estimate
    gain: Estimate
    exported: Estimate
    expected: Estimate | None
    captured: Estimate | None

    def _words(self) -> Iterable[str]:
        yield f"{with_error(*self.before)} → {with_error(*self.after)}"
        if self.captured is not None:
            yield f"captured={with_error(*self.captured)}"


def deviation(values: Float[Tensor, "starts repeats"], *, conditional: bool = False) -> float:
    """The standard deviation between samples, or between those of one start; computed on the CPU, in float64."""
    values = values.detach().double().cpu()
    return (values.var(1).mean().sqrt() if conditional else values.std()).item()


def plan_rewards(
    evaluation: Evaluation, betas: Sequence[float], *, conditional: bool = False
) -> tuple[RewardPlan, ...]:
    """The plan of each reward of an evaluation of the pretrained chain.

    Args:
        evaluation: of the pretrained chain, with several rewards.
        betas: KL weights, in units of R per nat.
        conditional: whether the bounds are given the start.
    """
    plans = []
    for values in evaluation.each_reward:
        gains = [gain(evaluation, beta, conditional=conditional, of=values) for beta in betas]
        means, errors = (tuple(column) for column in zip(*gains)) if gains else ((), ())
        std = deviation(values, conditional=conditional)
        plans.append(RewardPlan(*mean_and_error(values), std, means, errors))
    return tuple(plans)


def judge_rewards(
    before: Evaluation, after: Evaluation, exported: Evaluation, beta: float | None
) -> tuple[RewardJudgement, ...]:
    """Each reward of a chain before and after training; arguments and errors as in `judging.judge`.

    The law of the bound is weighed from the same trajectories as there (`bounds.sharpest`). Before training, after it
    and under that law, the noise is the same, so that all differences are paired.
    """
    chosen = None
    if beta:
        finite = bool(after.log_ratio.isfinite().all())
        trained = finite and sharpest(before, after, beta)[1] == "trained"
        chosen = after if trained else before
    judgements = []
    for j, (old, new, sold) in enumerate(zip(before.each_reward, after.each_reward, exported.each_reward, strict=True)):
        expected = captured = None
        start, end = old.double().mean(1), new.double().mean(1)
        if chosen is not None and beta:
            tilted = jackknife(log_weights_of(chosen, beta), chosen.each_reward[j].double())[1]
            expected, share = mean_and_error(tilted - start), share_of(end - start, tilted - start)
            if abs(expected.mean) > CLEAR * expected.error and share.error <= VAGUE:
                captured = share
        judgements.append(
            RewardJudgement(
                before=mean_and_error(start),
                after=mean_and_error(end),
                gain=mean_and_error(end - start),
                exported=mean_and_error(sold),
                expected=expected,
                captured=captured,
            )
        )
    return tuple(judgements)
