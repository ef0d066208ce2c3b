"""The functions of a run: rewards, which are raised, and judges, which are measured and never optimised.

A judge has the coefficient 0 beside the rewards (`objectives.WeightedRewards`): wherever a chain is evaluated, the same
samples are scored by both, and no network is called for the judges. The loop knows the rewards alone.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_diffusion.commands.finetune.problem.estimators import BLACK_BOX, Chosen, chosen, no_gradient
from implicit_diffusion.commands.finetune.specs import SetupSpec
from implicit_diffusion.commands.rewards.names import blamed, load_reward
from implicit_diffusion.commands.rewards.trust import short
from implicit_diffusion.commands.rewards.weights import judge_labels, labels, names_of
from implicit_diffusion.errors import InvalidInputError, NoGradientError, NonFiniteError, RewardError
from implicit_diffusion.function_checks import FunctionWarning
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward, WeightedRewards
from implicit_diffusion.objectives.reward import check_values
from implicit_diffusion.objectives.weighted_rewards import named
from implicit_diffusion.particles import Particles
from implicit_diffusion.reward_values import scores_of
from implicit_diffusion.samplers.chain import TRIAL, Chain

MUST = "; a {} maps samples (n, …) to (n,), and leaves the samples alone"
Through = Callable[[Callable[..., Any]], Callable[..., Any]]


class Loaded(NamedTuple):
    """Functions of images by their labels.

    Args:
        rewards: that are raised.
        judges: that are measured.
    """

    rewards: Mapping[str, Callable[..., Any]]
    judges: Mapping[str, Callable[..., Any]]


class Tried(NamedTuple):
    """Functions of a chain's states, checked.

    Args:
        reward: R.
        judged: the reward with its judges; None without a judge.
        estimator: of the gradient of R.
    """

    reward: Reward
    judged: WeightedRewards | None
    estimator: Chosen


def load(spec: SetupSpec, device: torch.device) -> Loaded:
    """Load the rewards and judges; errors as in `load_reward`."""
    elsewhere: dict[str, Any] = {"python": spec.reward_python, "timeout": spec.reward_timeout}
    names = zip(labels(spec.reward), names_of(spec.reward))
    rewards = {label: load_reward(name, device, **elsewhere) for label, name in names}
    judges = {}
    for label, name in zip(judge_labels(spec.reward, spec.judge), spec.judge):
        with _as_judge():
            judges[label] = _judge(load_reward(name, device, **elsewhere), label)
    return Loaded(rewards, judges)


def tried(
    loaded: Loaded, through: Through, spec: SetupSpec, chain: Chain, generators: Callable[[], GlobalGenerators]
) -> Tried:
    """Check each function on two pretrained samples, and choose an estimator; what is unusual is printed.

    Args:
        loaded: from `load`.
        through: makes a function of the chain's states of a function of images.
        spec: of the setup.
        chain: whose samples are scored.
        generators: the global ones, in the same state at every call.

    Raises:
        InvalidInputError: from `Reward.check_value` and `Reward.check_slope`; the message names the function.
    """
    source = Noise(0)
    trial = chain.endpoint(chain.sample(source, 2, TRIAL), source, TRIAL)
    reward = _reward(loaded.rewards, through)
    members = reward.members if isinstance(reward, WeightedRewards) else (reward,)
    reasons: list[str | None] = []
    for member, name in zip(members, names_of(spec.reward), strict=True):
        with named(short(name)) if len(members) > 1 else nullcontext():
            reasons.append(_check(member, name, trial, spec, generators))
    estimator = chosen(spec.estimator, next(filter(None, reasons), None))
    if not loaded.judges:
        return Tried(reward.as_checked(), None, estimator)
    for label, function in loaded.judges.items():
        with named(f"`judge` {label}"):
            through(function)  # refused here, and by name, where the model has no condition for it
    judged = WeightedRewards({**loaded.rewards, **loaded.judges}, through=through)
    for member, label, name in zip(judged.members[len(members) :], loaded.judges, spec.judge, strict=True):
        with _as_judge(), blamed(name, MUST.format("judge")):
            member.check_value(trial)
            _say_if_unsteady(member, f"judge     {label}", trial, generators)
    return Tried(reward.as_checked(), judged.as_checked(), estimator)


def _reward(functions: Mapping[str, Callable[..., Any]], through: Through) -> Reward:
    """The reward of the chain's states, which are decoded once for all functions."""
    if len(functions) > 1:
        return WeightedRewards(functions, through=through)
    (function,) = functions.values()
    return Reward(through(function))


def _judge(function: Callable[..., Tensor], label: str) -> Callable[..., Tensor]:
    """The same function; whatever is wrong with it or with its numbers, an error names the judge.

    Raises:
        RewardError: when called, for what the function raises, and for results that are not one number per sample.
        NonFiniteError: when called, for NaN or infinity.
    """

    @functools.wraps(function)
    def calling(x: Tensor, *condition: Any) -> Tensor:
        with _as_judge():
            try:
                scores = scores_of(function(x, *condition), x)
            except InvalidInputError as error:
                raise RewardError(f"`judge` {label}: {str(error).removeprefix('reward ')}") from error
        check_values(f"`judge` {label}: the value", scores)
        return scores

    calling.__dict__["__signature__"] = inspect.signature(function)
    return calling


@contextmanager
def _as_judge() -> Iterator[None]:
    """Let the errors of the block, which were written for rewards, speak of a judge."""
    try:
        yield
    except (InvalidInputError, RewardError, NonFiniteError) as error:
        raise type(error)(str(error).replace("`reward`", "`judge`")) from error


def _check(
    reward: Reward, name: str, trial: Particles, spec: SetupSpec, generators: Callable[[], GlobalGenerators]
) -> str | None:
    """Check one reward; why its gradient cannot be followed, where that is to be decided."""
    why_not = None
    with blamed(name, MUST.format("reward")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reward.check_value(trial)
            if spec.estimator == "auto":
                why_not = no_gradient(reward, trial)
            elif spec.estimator not in BLACK_BOX:
                _check_slope(reward, trial, spec.estimator)
        for each in caught:
            if issubclass(each.category, FunctionWarning):
                print(f"reward    {short(name)} {str(each.message).removeprefix('reward ')}")
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        _say_if_unsteady(reward, f"reward    {short(name)}", trial, generators)
    return why_not


def _check_slope(reward: Reward, trial: Particles, estimator: str) -> None:
    try:
        reward.check_slope(trial)
    except (NoGradientError, RewardError) as error:
        raise InvalidInputError(f"{error}; or leave out --estimator {estimator}, which needs a gradient") from error


@torch.no_grad()
def _say_if_unsteady(reward: Reward, words: str, trial: Particles, generators: Callable[[], GlobalGenerators]) -> None:
    """Print that a reward has a state of its own: other values from the same samples and the same global generators."""
    values: list[Tensor] = []
    for _ in range(2):
        with generators():
            values.append(reward.of(trial))
    if not torch.allclose(values[0], values[1]):
        print(
            f"{words} gives other values on the same samples when called again, with the global "
            "generators as they were: it has a state of its own, which no checkpoint keeps, and a resumed run will not "
            "be the same. Let it draw from the generators of torch, NumPy or Python themselves"
        )
