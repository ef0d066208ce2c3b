r"""The soft maximum of a reward, start by start: log E e^w of importance weights, and the mean that they tilt to.

With M trajectories per x_0 a log-mean-exp is biased by O(1/M). The jackknife over the M,

    M·T_M − (M − 1)·mean T_{M−1},

removes the first order. How far the estimate moves when it is made of M/2 shows what is left.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_type
from implicit_diffusion.evaluation.chains import Evaluation


def log_weights_of(evaluation: Evaluation, beta: float, *, least: int = 2) -> Float[Tensor, "starts repeats"]:
    """R/β − log dP_θ/dP_0 of every trajectory.

    Args:
        evaluation: of any control.
        beta: KL weight > 0.
        least: number of trajectories per start that are needed.

    Raises:
        InvalidInputError: fewer than `least` trajectories per start; path KLs that are not finite; a β for which R/β
            overflows.
    """
    check_type("evaluation", evaluation, Evaluation, "pass what evaluate(chain, reward, noise, ...) returns")
    if evaluation.reward.shape[1] < least:
        raise InvalidInputError(
            f"evaluation must hold at least {least} trajectories per start, got 1; pass repeats=8, for example"
        )
    if not evaluation.log_ratio.isfinite().all():
        raise InvalidInputError(
            "evaluation holds path KLs that are infinite or NaN: a trained row of its chain has no noise; keep the "
            "pretrained network there, pretrained_rows='noiseless', or evaluate the pretrained chain"
        )
    log_weights = evaluation.reward.double() / beta - evaluation.log_ratio.double()
    if not log_weights.isfinite().all():
        raise InvalidInputError(f"reward / beta must be finite, but rewards are not or beta is too small, {beta}")
    return log_weights


def control_variate(evaluation: Evaluation, beta: float) -> Float[Tensor, " starts"]:
    """β Σ_k ⟨Δ_k, ξ_k⟩/s_k, averaged over each start: J with the control variate less J without. Its mean is zero."""
    return beta * (evaluation.log_ratio.double() - evaluation.path_kl.double()).mean(1)


def jackknife(
    log_weights: Float[Tensor, "starts repeats"], reward: Float[Tensor, "starts repeats"]
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """For every start log E e^w and E[R e^w]/E e^w, each without its bias of first order."""
    repeats = log_weights.shape[1]
    top, leader = log_weights.max(1, keepdim=True)
    w = (log_weights - top).exp()
    total, weighted = w.sum(1, keepdim=True), (w * reward).sum(1, keepdim=True)
    # The sum without the largest weight may be smaller than the rounding of that weight, or underflow: it is computed
    # on a scale of its own. The sums without another weight contain the largest one, and lose no digits.
    others = log_weights.scatter(1, leader, -math.inf)
    log_total_left = (total - w).log().scatter(1, leader, others.logsumexp(1, keepdim=True) - top)
    led = (others.softmax(1) * reward).sum(1, keepdim=True)
    tilted_left = ((weighted - w * reward) / (total - w)).scatter(1, leader, led)

    def corrected(full: Tensor, left_out: Tensor) -> Tensor:
        return (repeats * full[:, 0]) - (repeats - 1) * left_out.mean(1)

    value = corrected((total / repeats).log(), log_total_left - math.log(repeats - 1)) + top[:, 0]
    return value, corrected(weighted / total, tilted_left)


def from_half(log_weights: Float[Tensor, "starts repeats"]) -> Float[Tensor, " starts"]:
    """For every start log E e^w from half the repeats, averaged over both halves; uncorrected below 4 repeats."""
    half = log_weights.shape[1] // 2
    if half < 2:
        return log_weights.logsumexp(1) - math.log(log_weights.shape[1])
    parts = torch.cat([log_weights[:, :half], log_weights[:, half : 2 * half]])
    return jackknife(parts, parts)[0].view(2, -1).mean(0)


def influence(
    log_weights: Float[Tensor, "starts repeats"], reward: Float[Tensor, "starts repeats"]
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """Log E e^w and E[R e^w]/E e^w over all trajectories at once, as one number per start.

    The mean of these numbers is the estimate, and their spread gives its standard error (the influence function).
    """
    value = log_weights.logsumexp((0, 1)) - math.log(log_weights.numel())
    w = (log_weights - value).exp()  # of mean one
    tilted = (w * reward).mean()
    return value + (w - 1).mean(1), tilted + (w * (reward - tilted)).mean(1)
