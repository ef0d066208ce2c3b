"""How good can fine-tuning get? The bound J* and the law that attains it, from samples alone.

Whatever the control, J = −E R + β·KL(path) cannot go below the soft value of the pretrained chain,

    J ≥ J* = E_{x_0}[ −β log E_{u_0}( e^{R(x_N)/β} | x_0 ) ] ≥ −β log E_{u_0} e^{R(x_N)/β}

(Donsker and Varadhan's variational formula, given x_0, whose law is not controlled). The tilted path law
dP* ∝ e^{R/β} dP_0 attains J*; its reward and KL are the frontier that a run can approach as N grows.

The expectations may be taken under any control with importance weights: E_{u_0}[e^{R/β}|x_0] = E_{u_θ}[e^w|x_0] with
w = R/β − log dP_θ/dP_0. Under the pretrained chain (w = R/β) this plans a run before any training; under the trained
one the weights are nearly constant, and the same number of trajectories gives a much sharper J*.

With M trajectories per x_0 a log-mean-exp is biased by O(1/M); the jackknife over the M takes the first order away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops.evaluation import Evaluation, mean_and_error


@dataclass(frozen=True)
class Bound:
    """The optimum of J = −E R + β·KL over all controls, each number with its standard error.

    Args:
        beta: KL weight, in reward per nat.
        j: J*.
        reward: E R under the optimal path law.
        path_kl: its KL to the pretrained path, in nats.
        effective_samples: 1/Σw² of the importance weights: within a start, on average over the starts, where the
            bound is conditional; of all trajectories together where it is not.
        trusted: whether these are enough (half the repeats, or 50) not to rest on a few lucky trajectories.
    """

    beta: float
    j: float
    j_se: float
    reward: float
    reward_se: float
    path_kl: float
    path_kl_se: float
    effective_samples: float
    trusted: bool


def bound(evaluation: Evaluation, beta: float, *, conditional: bool = True) -> Bound:
    """J* from trajectories of any control of the chain.

    Args:
        evaluation: with at least 2 repeats per start.
        beta: KL weight > 0.
        conditional: given x_0, as above. Otherwise −β log E e^{R/β} over all trajectories: a bound that is never too
            high and tight for a memoryless chain, and whose bias falls with all of them instead of the repeats.

    Raises:
        InvalidInputError: beta not positive and finite; a single trajectory per start; path KLs that are infinite.
    """
    _check(evaluation, beta)
    reward, repeats = evaluation.reward.double(), evaluation.reward.shape[1]
    log_weights = reward / beta - evaluation.log_ratio.double()
    if conditional:
        value, tilted = _jackknife(log_weights, reward)
        effective = (1 / torch.softmax(log_weights, 1).square().sum(1)).mean().item()
    else:
        value, tilted = _influence(log_weights, reward)
        effective = (1 / torch.softmax(log_weights.flatten(), 0).square().sum()).item()
    return Bound(
        beta,
        *mean_and_error(-beta * value),
        *mean_and_error(tilted),
        *mean_and_error(tilted / beta - value),
        effective_samples=effective,
        trusted=effective >= (repeats / 2 if conditional else 50),
    )


def gain(pretrained: Evaluation, beta: float, *, conditional: bool = True) -> tuple[float, float]:
    """E R under the optimal path law less E R of the pretrained chain, with the standard error of the difference.

    Both means are of the same trajectories, so most of what either is uncertain about cancels.

    Args:
        pretrained: of the pretrained chain.
        beta: KL weight > 0.
        conditional: as in `bound`.
    """
    reward = pretrained.reward.double()
    tilted = (_jackknife if conditional else _influence)(reward / beta, reward)[1]
    return mean_and_error(tilted - reward.mean(1))


def possible(before: Evaluation, after: Evaluation, beta: float) -> tuple[float, float]:
    """J_before − J*, what any fine-tuning could gain, with its standard error; arguments as in `captured`."""
    gained, missed = _gained_and_missed(before, after, beta)
    return mean_and_error(gained + missed)


def captured(before: Evaluation, after: Evaluation, beta: float) -> tuple[float, float]:
    """The share (J_before − J_after)/(J_before − J*) of the possible gain, with its standard error.

    Both differences are sharp: before and after share their noise, so the numerator is paired; and J_after − J* is the
    mean of −β times a log-weight against its soft maximum over the same trajectories.

    Args:
        before: the pretrained chain.
        after: the trained one under the same noise, with at least 2 repeats per start.
        beta: KL weight > 0.

    Raises:
        InvalidInputError: as `bound`.
    """
    gained, missed = _gained_and_missed(before, after, beta)
    total = (gained + missed).mean()
    share = gained.mean() / total
    error = ((1 - share) * gained - share * missed).std() / total.abs() / len(gained) ** 0.5
    return share.item(), error.item()


def _gained_and_missed(
    before: Evaluation, after: Evaluation, beta: float
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """J_before − J_after and J_after − J* of every start."""
    _check(after, beta)
    log_weights = after.reward.double() / beta - after.log_ratio.double()
    best = -beta * _jackknife(log_weights, after.reward.double())[0]
    gained = (before.objective(beta) - after.objective(beta)).double().mean(1)
    return gained, after.objective(beta).double().mean(1) - best


def _check(evaluation: Evaluation, beta: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise InvalidInputError(f"beta must be positive and finite: without a KL there is no bound; got {beta}")
    if evaluation.reward.shape[1] < 2:
        raise InvalidInputError("evaluation must hold at least 2 trajectories per start, got 1; pass repeats=8, say")
    if not evaluation.log_ratio.isfinite().all():
        raise InvalidInputError(
            "evaluation holds path KLs that are infinite or NaN: a trained row of its chain has no noise; keep the "
            "pretrained network there, pretrained_rows='noiseless', or evaluate the pretrained chain"
        )


def memory_of_start(values: Float[Tensor, "starts repeats"]) -> tuple[float, float]:
    """Var E[R|x_0] / Var R, the share of the variance that x_0 decides (0: memoryless), with its standard error.

    One-way analysis of variance: the mean square between starts holds 1/repeats of the variance within, which is
    subtracted. The error is a jackknife over starts.
    """
    values = values.double()
    repeats = values.shape[1]
    within = values.var(1)
    means = values.mean(1)

    def share(mean: Tensor, square: Tensor, noise: Tensor, n: int) -> Tensor:
        between = (square - mean**2) * n / (n - 1) - noise / repeats
        return between / (between + noise)

    n = len(means)
    total, square, noise = means.sum(), means.square().sum(), within.sum()
    estimate = share(total / n, square / n, noise / n, n)
    left_out = share((total - means) / (n - 1), (square - means.square()) / (n - 1), (noise - within) / (n - 1), n - 1)
    error = ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt()
    return estimate.item(), error.item()


def _jackknife(
    log_weights: Float[Tensor, "starts repeats"], reward: Float[Tensor, "starts repeats"]
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """For every start log E e^w and E[R e^w]/E e^w, each less its first-order bias: M T_M − (M−1)·mean T_{M−1}."""
    repeats = log_weights.shape[1]
    top = log_weights.max(1, keepdim=True).values
    w = (log_weights - top).exp()
    total, weighted = w.sum(1, keepdim=True), (w * reward).sum(1, keepdim=True)
    # Leaving the largest weight out of a difference would cancel; sums of the others are formed directly.
    others = 1 - torch.eye(repeats, dtype=w.dtype, device=w.device)
    total_left, weighted_left = w @ others, (w * reward) @ others

    def corrected(full: Tensor, left_out: Tensor) -> Tensor:
        return (repeats * full[:, 0]) - (repeats - 1) * left_out.mean(1)

    value = corrected((total / repeats).log(), (total_left / (repeats - 1)).log()) + top[:, 0]
    return value, corrected(weighted / total, weighted_left / total_left)


def _influence(
    log_weights: Float[Tensor, "starts repeats"], reward: Float[Tensor, "starts repeats"]
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """The same over all trajectories at once, as one number per start: their mean is it, their spread its error."""
    value = log_weights.logsumexp((0, 1)) - math.log(log_weights.numel())
    w = (log_weights - value).exp()  # of mean one
    tilted = (w * reward).mean()
    return value + (w - 1).mean(1), tilted + (w * (reward - tilted)).mean(1)
