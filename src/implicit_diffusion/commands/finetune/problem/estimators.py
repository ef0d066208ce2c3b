"""Which way of getting the gradient a run takes: by name, or by whether its reward has a gradient."""

from __future__ import annotations

import re
import warnings
from typing import Literal, NamedTuple

from implicit_diffusion.errors import InvalidInputError, NoGradientError, RewardError
from implicit_diffusion.evaluation.chains import Evaluation, conditions_of
from implicit_diffusion.function_checks import FlatWarning
from implicit_diffusion.gradients import (
    Adjoint,
    AdjointMatching,
    Estimator,
    ScoreFunction,
    Surrogate,
    TruncatedBackprop,
)
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain

EstimatorName = Literal["adjoint", "truncated", "adjoint-matching", "score", "surrogate"]
Asked = Literal["auto"] | EstimatorName
BLACK_BOX = ("score", "surrogate")  # follow the reward's values
NEEDS_NOISE = {  # and what for
    **dict.fromkeys(BLACK_BOX, "follows a reward by what noise does to it"),
    "adjoint-matching": "is for samplers that forget where they began",
}


class Chosen(NamedTuple):
    """An estimator, and why it was chosen where nobody named one."""

    name: EstimatorName
    why: str | None = None


def no_gradient(reward: Reward, trial: Particles) -> str | None:
    """Why the gradient of a reward cannot be followed, in words; None where it can.

    Raises:
        InvalidInputError: it has one, which is not finite, of another dtype, or mixes samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlatWarning)
        try:
            reward.check_slope(trial)
        except (NoGradientError, FlatWarning) as error:
            return re.split("[:,]", str(error))[0]
        except RewardError as error:  # it meets a tensor with a gradient, and cannot use it
            return str(error)
    return None


def chosen(asked: Asked, why_not: str | None) -> Chosen:
    """The estimator that was asked for; with "auto" the adjoint, unless a reward has no gradient.

    Args:
        asked: its name, or "auto".
        why_not: what `no_gradient` says, about the first reward that has none.
    """
    if asked != "auto":
        return Chosen(asked)
    if why_not is None:
        return Chosen("adjoint", "the reward has a gradient")
    return Chosen("surrogate", why_not)


def check_chain(name: EstimatorName, chain: Chain) -> None:
    """Raise `InvalidInputError` where an estimator that rests on noise is to go through steps that add none."""
    bare = chain.table.noiseless(among=chain.trained_rows)
    if name in NEEDS_NOISE and bare:
        raise InvalidInputError(
            f"--estimator {name} {NEEDS_NOISE[name]}, and {len(bare)} of the {chain.num_steps} steps of "
            f"{chain.table.name} are trained without noise; use --penalty path-kl, with a --scheduler that adds noise "
            "(ddpm, ddim with --eta 1, euler-ancestral, flow-memoryless), or a reward with a gradient and "
            "--estimator adjoint"
        )


def estimator_of(name: EstimatorName, chain: Chain, noise: Noise, depth: int | None) -> Estimator:
    """The estimator of this name.

    Args:
        name: of it.
        chain: that is trained.
        noise: of a surrogate's weights and of what it draws.
        depth: of the truncated one; by default the least that reaches a trained step.
    """
    if name == "truncated":
        least = chain.num_steps - max(chain.trained_rows, default=0)
        return TruncatedBackprop(least if depth is None else depth)
    if name == "surrogate":
        return Surrogate(noise=noise)
    return {"adjoint": Adjoint, "adjoint-matching": AdjointMatching, "score": ScoreFunction}[name]()


def begin(estimator: Estimator, chain: Chain, samples: Evaluation, noise: Noise) -> None:
    """Let a surrogate learn from the pretrained samples of a plan, which are paid for.

    Args:
        estimator: of the run.
        chain: that is trained, as it was before.
        samples: of the plan: one for each of its first starts.
        noise: that they were drawn from.
    """
    if isinstance(estimator, Surrogate):
        starts, repeats = samples.reward.shape
        condition = conditions_of(chain, noise, starts=starts, repeats=repeats)
        x = samples.samples[:, 0]
        given = None if condition is None else {name: value[: len(x)] for name, value in condition.items()}
        estimator.learn(x, samples.reward[: len(x), 0], given)
