r"""What a design is worth: the expected information gain between two contrastive bounds.

An outcome y = T(z, ε; ξ) is compared with L contrasts z_1..z_L of the prior. Let p_l = p(y|z_l, ξ), p_0 = p(y|z, ξ):

    lower = log p_0 − log (p_0 + p_1 + … + p_L)/(L + 1),        upper = log p_0 − log (p_1 + … + p_L)/L,
    E lower ≤ EIG(ξ) ≤ E upper.

The first is prior contrastive estimation (Foster et al., *A Unified Stochastic Gradient Approach to Designing
Bayesian-Optimal Experiments*, arXiv 1911.00294), which is never above log(L + 1), whatever the design; the second is
nested Monte Carlo (Rainforth et al., *On Nesting Monte Carlo Estimators*, arXiv 1709.06181), by Jensen's inequality.
Both close in on the gain as 1/L, once L is well above its exponential. They cost L + 1 evaluations of the likelihood
for every outcome.

The lower bound is differentiable in the design, and is the usual objective: the baseline of `InformationGain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.design.experiment import Experiment
from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, memory_for
from implicit_diffusion.evaluation.chains import Estimate, mean_and_error
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import Shown, with_error

AT_ONCE = 2**18  # likelihoods in one call
NOTHING = 2.0  # standard errors, within which a gain may be nothing


def contrastive_bounds(
    experiment: Experiment, noise: Noise, outcomes: int, contrasts: int
) -> tuple[Float[Tensor, " outcomes"], Float[Tensor, " outcomes"]]:
    """The lower and the upper bound of every outcome, in nats, differentiable in the design.

    Args:
        experiment: at the design to judge; its noise and latents are drawn anew.
        noise: source of every random number; the same noise gives the same outcomes' latents and ε under any design.
        outcomes: how many outcomes, each with contrasts of its own.
        contrasts: L, for each of them.

    Raises:
        InvalidInputError: not an experiment, no noise, or counts below one.
        MemoryLimitError: more likelihoods than the device can hold.
    """
    check_type("experiment", experiment, Experiment, "use GaussianExperiment, or a subclass of Experiment")
    check_type("noise", noise, Noise, "use Noise(0), for example")
    n, contrasts = check_integer("outcomes", outcomes), check_integer("contrasts", contrasts)
    with memory_for(f"{n} × {contrasts} contrasts"):
        z, epsilon = experiment.draw(n, noise.stream(0))
        y = experiment.outcome(z, epsilon)
        others = experiment.prior_draws(n * contrasts, noise.stream(1))
        repeated = y.repeat_interleave(contrasts, 0)
        log_p = experiment.log_likelihood(torch.cat([y, repeated]), torch.cat([z, others]))
        own, others = log_p[:n], log_p[n:].view(n, contrasts)
        every = torch.cat([own[:, None], others], 1)
        lower = own - every.logsumexp(1) + math.log(contrasts + 1)
        return lower, own - others.logsumexp(1) + math.log(contrasts)


@dataclass(frozen=True, repr=False)
class Gain(Shown):
    """What an experiment's outcomes say about its latents, in nats.

    Args:
        lower_bounds: of every outcome, with shape (outcomes,).
        upper_bounds: likewise.
        contrasts: L, for each outcome.
    """

    lower_bounds: Float[Tensor, " outcomes"]
    upper_bounds: Float[Tensor, " outcomes"]
    contrasts: int

    @property
    def lower(self) -> Estimate:
        """The lower bound of the expected information gain, at most `ceiling`."""
        return mean_and_error(self.lower_bounds)

    @property
    def upper(self) -> Estimate:
        """The upper bound."""
        return mean_and_error(self.upper_bounds)

    @property
    def ceiling(self) -> float:
        """log(L + 1), which no lower bound of L contrasts exceeds."""
        return math.log(self.contrasts + 1)

    def over(self, other: Gain) -> Estimate:
        """By how much more another design is outdone: the mean of lower − other.lower, with its standard error.

        Outcome by outcome, so that what both designs owe to the same latents cancels: both need the same noise.

        Raises:
            InvalidInputError: a gain of another number of outcomes or contrasts.
        """
        check_type("other", other, Gain, "use what information_gain returns")
        if (len(self.lower_bounds), self.contrasts) != (len(other.lower_bounds), other.contrasts):
            raise InvalidInputError(
                f"other must have {len(self.lower_bounds)} outcomes with {self.contrasts} contrasts, got "
                f"{len(other.lower_bounds)} with {other.contrasts}; use information_gain with the same arguments"
            )
        return mean_and_error(self.lower_bounds - other.lower_bounds)

    def advice(self, other: Gain | None = None) -> list[str]:
        """What the numbers do not show, in plain words; empty where they show what they say.

        Args:
            other: of another design, e.g. the one before optimisation, under the same noise.
        """
        messages, lower, upper = [], self.lower, self.upper
        compared = [("the design's gain", lower)]
        compared += [] if other is None else [("the gain over the other design", self.over(other))]
        for what, (mean, error) in compared:
            if not abs(mean) > NOTHING * error:
                messages.append(
                    f"{what}, {with_error(mean, error)} nats, is within its error of nothing: use more outcomes to "
                    "see it, or expect none"
                )
        if upper.mean - lower.mean > max(0.1 * upper.mean, NOTHING * (lower.error + upper.error)):
            messages.append(
                f"the gain lies between {lower.mean:.2f} and {upper.mean:.2f} nats (no lower bound of {self.contrasts} "
                f"contrasts exceeds {self.ceiling:.2f}): use more contrasts"
            )
        return messages

    def _words(self) -> Iterable[str]:
        low, high = self.lower, self.upper
        yield f"{with_error(*low)} to {with_error(*high)} nats"
        yield f"{len(self.lower_bounds)} outcomes × {self.contrasts} contrasts"


@torch.no_grad()
def information_gain(experiment: Experiment, noise: Noise, *, outcomes: int = 1000, contrasts: int = 1000) -> Gain:
    """The expected information gain of the present design, between two bounds, with their standard errors.

    Args:
        experiment: at the design to judge.
        noise: of the judgement; give the same to every design that is compared.
        outcomes: how many; they decide on the standard errors.
        contrasts: L, for each of them; they decide on the distance of the bounds.

    Raises:
        InvalidInputError: as `contrastive_bounds`, or fewer than two outcomes.
        MemoryLimitError: more likelihoods than the device can hold.
    """
    check_type("experiment", experiment, Experiment, "use GaussianExperiment, or a subclass of Experiment")
    check_type("noise", noise, Noise, "use Noise(0), for example")
    outcomes, contrasts = check_integer("outcomes", outcomes, 2), check_integer("contrasts", contrasts)
    chunk = max(1, AT_ONCE // contrasts)
    with eval_mode(experiment):
        parts = [
            contrastive_bounds(experiment, noise.stream(first), min(chunk, outcomes - first), contrasts)
            for first in range(0, outcomes, chunk)
        ]
    lower, upper = map(torch.cat, zip(*parts, strict=True))
    return Gain(lower, upper, contrasts)
