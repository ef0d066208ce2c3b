"""A pretrained chain against its fine-tuned self: rewards, path KL, J, and the share of the possible gain."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from implicit_diffusion.evaluation.bounds import Bound, bound, sharpest
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mean_and_error
from implicit_diffusion.evaluation.gains import captured, possible
from implicit_diffusion.showing import Shown, with_error

CLEAR = 2.0  # standard errors beyond which a difference counts
VAGUE = 0.5  # standard error of a captured share that is not worth a number


@dataclass(frozen=True, repr=False)
class Untrained(Shown):
    """The chain that training began with, where it is not the pretrained one: guidance is missing from it, say.

    Args:
        reward: E R.
        path_kl: to the pretrained path law, in nats; of guidance, what it costs.
        j: β·KL − reward.
        j_above: the paired difference from J of the pretrained chain.
    """

    reward: Estimate
    path_kl: Estimate
    j: Estimate
    j_above: Estimate

    def _words(self) -> Iterable[str]:
        yield f"reward={with_error(*self.reward)}"
        yield f"path_kl={with_error(*self.path_kl)} nats"


@dataclass(frozen=True, repr=False)
class Judgement(Shown):
    """The numbers of a fine-tuning, each with its standard error; None where a number does not exist or is not finite.

    J = β·KL − reward holds for these numbers as they are, before, after and at the bound, and the captured share is the
    fall of J as a share of the largest possible fall: the path KL is that of the squares (`Evaluation.path_kl`).

    J falls from where training began: from the pretrained chain, or from the untrained one where the two differ.

    Args:
        beta: weight of the path KL; None where the penalty is another one, and there is no J.
        reward_before: of the pretrained chain.
        reward_after: of the trained chain.
        reward_gain: the paired difference of the two.
        reward_exported: of the exported pipeline.
        exported_less_after: the paired difference of exported and trained chain.
        reward_std_before: standard deviation of the reward between pretrained samples.
        path_kl: of the trained chain, in nats.
        j_before: J of the pretrained chain.
        j_after: J of the trained chain.
        j_fall: the paired difference of the chain that training began with and the trained one.
        bound: J* and the law that attains it; None without a J.
        bound_from: the chain whose samples the bound is made of.
        possible: J_begun − J*, the most that could be gained.
        share: (J_begun − J_after)/(J_begun − J*), whether or not it means anything; see `captured`.
        untrained: the chain that training began with; None where that is the pretrained chain, or without a J.
    """

    beta: float | None
    reward_before: Estimate
    reward_after: Estimate
    reward_gain: Estimate
    reward_exported: Estimate
    exported_less_after: Estimate
    reward_std_before: float
    path_kl: Estimate | None
    j_before: Estimate | None
    j_after: Estimate | None
    j_fall: Estimate | None
    bound: Bound | None
    bound_from: Literal["trained", "pretrained"] | None
    possible: Estimate | None
    share: Estimate | None
    untrained: Untrained | None = None

    def _words(self) -> Iterable[str]:
        yield f"reward={with_error(*self.reward_before)} → {with_error(*self.reward_after)}"
        if self.path_kl is not None:
            yield f"path_kl={with_error(*self.path_kl)} nats"
        if self.captured is not None:
            yield f"captured={with_error(*self.captured)}"
        if self.worse:
            yield "worse"

    @property
    def worse(self) -> bool:
        """Whether J rose by more than two standard errors, or is not finite any more; without a J, the reward fell.

        A penalty that is not judged was zero before training: where the reward fell, what is minimised rose.
        """
        if self.beta is None:
            return -self.reward_gain.mean > CLEAR * self.reward_gain.error
        return self.j_fall is None or -self.j_fall.mean > CLEAR * self.j_fall.error

    @property
    def doubt(self) -> Literal["rose", "nothing", "vague"] | None:
        """Why the captured share means nothing.

        "rose": J rose. "nothing": within two standard errors nothing could be gained. "vague": the share is known no
        better than to a half.
        """
        if self.bound is None:
            return None
        if self.worse:
            return "rose"
        if self.possible is None or self.share is None:
            return None
        if not self.possible.mean > CLEAR * self.possible.error:
            return "nothing"
        return "vague" if self.share.error > VAGUE else None

    @property
    def captured(self) -> Estimate | None:
        """The share of the possible gain that was captured, where it means something."""
        return None if self.doubt else self.share


def judge(
    before: Evaluation,
    after: Evaluation,
    exported: Evaluation,
    beta: float | None,
    untrained: Evaluation | None = None,
) -> Judgement:
    """Compare a chain before and after training, and its exported pipeline; all on the same noise.

    Args:
        before: evaluation of the pretrained chain.
        after: evaluation of the trained chain.
        exported: evaluation of the pipeline that is exported.
        beta: weight of the path KL; None where the penalty is another one.
        untrained: evaluation of the chain that training began with; None for `before`.

    Raises:
        InvalidInputError: evaluations of different starts, or a single trajectory per start.
    """
    j_before, j_after = (None if beta is None else seen.objective(beta) for seen in (before, after))
    begun = j_before if untrained is None or beta is None else untrained.objective(beta)
    finite = bool(after.log_ratio.isfinite().all())
    best: Bound | None = None
    source: Literal["trained", "pretrained"] | None = None
    most: Estimate | None = None
    share: Estimate | None = None
    if beta and finite:
        best, source = sharpest(before, after, beta)
        most = Estimate(*possible(before, after, beta, untrained))
        share = Estimate(*captured(before, after, beta, untrained))
    elif beta:  # a chain that overflows says nothing about the bound
        best, source = bound(before, beta), "pretrained"
    return Judgement(
        beta=beta,
        reward_before=mean_and_error(before.reward),
        reward_after=mean_and_error(after.reward),
        reward_gain=mean_and_error(after.reward - before.reward),
        reward_exported=mean_and_error(exported.reward),
        exported_less_after=mean_and_error(exported.reward - after.reward),
        reward_std_before=before.reward.double().std().item(),
        path_kl=_finite(after.path_kl),
        j_before=_finite(j_before),
        j_after=_finite(j_after),
        j_fall=None if begun is None or j_after is None else _finite(begun - j_after),
        bound=best,
        bound_from=source,
        possible=most,
        share=share,
        untrained=None if untrained is None or beta is None else _untrained(untrained, before, beta),
    )


def _untrained(untrained: Evaluation, before: Evaluation, beta: float) -> Untrained:
    j = untrained.objective(beta)
    above = j - before.objective(beta)
    return Untrained(*map(mean_and_error, (untrained.reward, untrained.path_kl, j, above)))


def _finite(values: Tensor | None) -> Estimate | None:
    """Mean and standard error; None where there are no values, or their mean is not finite."""
    estimate = None if values is None else mean_and_error(values)
    return estimate if estimate is not None and math.isfinite(estimate.mean) else None
