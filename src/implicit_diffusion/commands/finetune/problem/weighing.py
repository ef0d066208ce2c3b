"""The units of several rewards: R = Σ_j w_j R_j/σ_j, with the σ_j that the plan measures.

The σ_j are the standard deviations of the R_j between samples of the pretrained chain (between those of one start,
where these have prompts or labels), so that R counts in deviations, and the weights w_j compare rewards of any units. A
single reward stays as it is, in its own units.

Stored trajectories hold the R_j, which do not depend on weights: R is added up again wherever they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from implicit_diffusion.commands.finetune.problem.setup import PLAN, Setup
from implicit_diffusion.commands.rewards.weights import labels, weighted
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import chains
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.clipping import ClippingEffect, effect_of_clipping
from implicit_diffusion.evaluation.each_reward import deviation
from implicit_diffusion.evaluation.plans import Plan
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.objectives import Reward, WeightedRewards
from implicit_diffusion.runs.clock import part
from implicit_diffusion.tables.named import clipped_for


def weighed(setup: Setup, plan: Plan) -> Setup:
    """The setup with R as the plan measures it, and with what clipping does to R.

    Args:
        setup: from `build`, not trained yet.
        plan: of the run.
    """
    setup = in_units(setup, plan)
    return replace(setup, clipping=_clipping(setup, setup.reward))


def in_units(setup: Setup, plan: Plan) -> Setup:
    """The setup with R as the plan measures it; arguments as in `weighed`."""
    return in_deviations(setup, [each.reward_std for each in plan.rewards])


def weighed_samples(setup: Setup, samples: Evaluation) -> Evaluation:
    """The pretrained trajectories of a plan, with R in its units; errors as in `deviations`."""
    if samples.rewards is None:
        return samples
    return chains.weighed(samples, in_deviations(setup, deviations(setup, samples)).reward)


def deviations(setup: Setup, samples: Evaluation) -> list[float]:
    """The σ_j of the rewards, from pretrained trajectories.

    Raises:
        InvalidInputError: one of them does not vary over the samples.
    """
    measured = [deviation(values, conditional=setup.given_start) for values in samples.each_reward]
    for name, values, std in zip(labels(setup.spec.reward), samples.each_reward, measured):
        if not std > 0:
            raise InvalidInputError(
                f"reward {name} is {values[0, 0].item():g} for every pretrained sample; leave it out, or use one that "
                "varies"
            )
    return measured


def in_deviations(setup: Setup, measured: Sequence[float]) -> Setup:
    """The setup with R, given the σ_j of several rewards."""
    if not isinstance(setup.reward, WeightedRewards):
        return setup
    pairs = zip(weighted(setup.spec.reward), measured, strict=True)
    return replace(setup, reward=setup.reward.with_coefficients([weight / std for (_, weight), std in pairs]))


@part("planning")
def _clipping(setup: Setup, reward: Reward) -> ClippingEffect | None:
    """The effect of switching `clip_sample` off; None where it was not on."""
    spec, chain, scheduler = setup.spec, setup.chain, setup.pretrained.scheduler
    if scheduler is None or not (spec.chain.no_clip and scheduler.config.get("clip_sample", False)):
        return None
    assert setup.sampler is not None
    noisy, eta = bool(chain.table.s.any()), spec.chain.eta
    clipped, options = clipped_for(scheduler, setup.sampler, noisy=noisy, eta=eta)
    with GlobalGenerators(spec.noise, PLAN, 2, device=chain.device):
        return effect_of_clipping(chain, clipped, reward, spec.noise.stream(PLAN), options)
