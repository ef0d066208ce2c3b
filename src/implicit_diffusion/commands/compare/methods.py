"""The methods that train: an estimator and a loop each, and what they are called elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from implicit_diffusion.commands.compare.policy import GROUP, Reusing, Standardised, shared_start
from implicit_diffusion.commands.compare.problems import DIFFERENTIABLE, Problem
from implicit_diffusion.gradients import (
    Adjoint,
    AdjointMatching,
    Estimator,
    FullBackprop,
    ScoreFunction,
    Surrogate,
    TruncatedBackprop,
)
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import TRIAL, Chain

FITTED = TRIAL + 1  # stream of the surrogate's own numbers, beside those of trajectories


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        words: what it is.
        gradient: whether it needs ∇R.
        trains: whether its training is compared.
        measured: whether its gradients are compared.
    """

    words: str
    gradient: bool = False
    trains: bool = True
    measured: bool = True


METHODS: dict[str, Method] = {
    "adjoint": Method("exact adjoint, nested loop", gradient=True),
    "adjoint-queue": Method("exact adjoint, queue", gradient=True),
    "full-backprop": Method("backpropagation through all steps", gradient=True, trains=False),
    "draft": Method("DRaFT-K: backpropagation through the last K steps", gradient=True),
    "alignprop": Method("AlignProp: through a random number of last steps", gradient=True),
    "adjoint-matching": Method("adjoint matching", gradient=True),
    "score": Method("score function, nested loop"),
    "score-queue": Method("score function, queue"),
    "surrogate": Method("fitted reward + score function of the rest, nested loop"),
    "surrogate-queue": Method("fitted reward + score function of the rest, queue"),
    "ddpo": Method("DDPO: standardised advantages, clip, two updates per batch"),
    "grpo": Method("GRPO: the same, in groups of four from one start"),
    "guidance": Method("guidance by ∇R at the predicted clean sample, no training", gradient=True, measured=False),
    "best-of": Method("best of M samples, no training", measured=False),
}


def applies(name: str, problem: str) -> bool:
    """Whether a method can be used for a problem: the reward has a gradient, or the method needs none."""
    return problem in DIFFERENTIABLE or not METHODS[name].gradient


def make_loop(
    name: str, problem: Problem, chain: Chain, update: Update, *, batch: int, depth: int, noise: Noise
) -> ChainLoop:
    """The loop of a method.

    Args:
        name: of a method that trains, or "full-backprop".
        problem: gives the objective.
        chain: that is trained.
        update: of its parameters.
        batch: samples per gradient.
        depth: K of "draft".
        noise: of everything.
    """
    kind = name.removesuffix("-queue")
    shared: dict[str, Any] = {"batch": batch, "noise": noise}
    if name in ("ddpo", "grpo"):
        grouped = name == "grpo"
        estimator = Standardised(problem.deviation, GROUP if grouped else None)
        return Reusing(
            shared_start(chain) if grouped else chain, problem.objective(), update, estimator=estimator, **shared
        )
    estimators: dict[str, Callable[[], Estimator]] = {
        "adjoint": Adjoint,
        "full-backprop": FullBackprop,
        "draft": lambda: TruncatedBackprop(depth),
        "alignprop": lambda: TruncatedBackprop(chain.num_steps, random=True),
        "adjoint-matching": AdjointMatching,
        "score": ScoreFunction,
        "surrogate": lambda: _surrogate(problem, noise),
    }
    loop = Nested if name == kind else Queue
    return loop(chain, problem.objective(), update, estimator=estimators[kind](), **shared)


def paid_before(name: str, problem: Problem) -> int:
    """Network evaluations before the first update: the samples that a surrogate begins with."""
    return len(problem.pairs[0]) * problem.pretrained.num_steps if name.startswith("surrogate") else 0


def _surrogate(problem: Problem, noise: Noise) -> Surrogate:
    """A surrogate that knows the pretrained samples of the plan."""
    surrogate = Surrogate(noise=noise.stream(FITTED))
    surrogate.learn(*problem.pairs)
    return surrogate
