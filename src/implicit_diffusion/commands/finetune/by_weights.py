"""What the weights of the judged trajectories add to a training: the law that it aimed at, and those of other β."""

from __future__ import annotations

from dataclasses import dataclass

from implicit_diffusion.evaluation.chains import Estimate, Evaluation
from implicit_diffusion.evaluation.gains import Reweighted, captured_by_weights, reweighted
from implicit_diffusion.evaluation.judging import CLEAR, VAGUE, Judgement

NEARBY = (2.0, 1.5, 1.2, 0.85, 0.7, 0.6, 0.5)  # other β, as multiples of the run's


@dataclass(frozen=True)
class ByWeights:
    """The trained chain, weighted.

    Args:
        reweighted: at the run's β; None where there are no weights.
        reweighted_captured: its share of the possible gain, one within its error; None where it cannot be measured.
        reweighted_nearby: at other β, the largest first.
        reweighted_missing: a sentence that says why there are no weights; None where there are.
    """

    reweighted: Reweighted | None
    reweighted_captured: Estimate | None
    reweighted_nearby: list[Reweighted]
    reweighted_missing: str | None


def by_weights(
    before: Evaluation, after: Evaluation, judgement: Judgement, untrained: Evaluation | None = None
) -> ByWeights:
    """The judged trajectories, weighted; no network is called.

    Args:
        before: evaluation of the pretrained chain.
        after: evaluation of the trained chain on the same noise.
        judgement: of the two.
        untrained: evaluation of the chain that training began with; None for `before`.
    """
    beta, most = judgement.beta, judgement.possible
    missing = _missing(after, beta)
    if missing is not None or beta is None:
        return ByWeights(None, None, [], missing)
    nearby = [reweighted(before, after, multiple * beta, untrained) for multiple in NEARBY]
    share = captured_by_weights(before, after, beta, untrained)
    clear = most is not None and most.mean > CLEAR * most.error and share.error <= VAGUE
    return ByWeights(reweighted(before, after, beta, untrained), share if clear else None, nearby, None)


def _missing(after: Evaluation, beta: float | None) -> str | None:
    """Why trajectories have no weights; None where they have."""
    if beta is None:
        return "The trained chain was not weighted: with a penalty on drifts there is no law that weights could aim at."
    if beta == 0:
        return "The trained chain was not weighted: with a KL weight of 0 there is no law that weights could aim at."
    if not after.log_ratio.isfinite().all():
        return (
            "The trained chain was not weighted: a trained step adds no noise, or sampling overflowed, so that its "
            "trajectories have no likelihood ratio to the pretrained chain."
        )
    return None
