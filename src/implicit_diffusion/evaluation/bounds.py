"""How good can fine-tuning get? The bound J* and the law that attains it, from samples alone.

Whatever the control, J = −E R + β·KL(path) cannot go below the soft value of the pretrained chain,

    J ≥ J* = E_{x_0}[ −β log E_{u_0}( e^{R(x_N)/β} | x_0 ) ] ≥ −β log E_{u_0} e^{R(x_N)/β}

(Donsker and Varadhan's variational formula, given x_0, whose law is not controlled). The tilted path law
dP* ∝ e^{R/β} dP_0 attains J*; its reward and KL are the frontier that a run can approach as N grows.

The expectations may be taken under any control with importance weights: E_{u_0}[e^{R/β}|x_0] = E_{u_θ}[e^w|x_0] with
w = R/β − log dP_θ/dP_0. Under the pretrained chain (w = R/β) this plans a run before any training; under the trained
one the weights are nearly constant, and the same number of trajectories gives a much sharper J*.

A chain that training has ruined tells less than the pretrained one, which never puts J* above its own J: `sharpest`
takes whichever of the two has more effective samples.

With M trajectories per x_0 a log-mean-exp is biased by O(1/M); the jackknife over the M takes the first order away.
What it leaves shows in how far the estimate moves when it is made of M/2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_number, check_tensor, check_type
from implicit_diffusion.evaluation.chains import Evaluation, mean_and_error
from implicit_diffusion.showing import Shown, with_error


@dataclass(frozen=True, repr=False)
class Bound(Shown):
    """The optimum of J = −E R + β·KL over all controls, each number with its standard error.

    Args:
        beta: KL weight, in reward per nat.
        j: J*.
        reward: E R under the optimal path law.
        path_kl: its KL to the pretrained path, in nats.
        effective_samples: 1/Σw² of the importance weights: within a start, on average over the starts, where the
            bound is conditional; of all trajectories together where it is not, or as few as the error over starts
            amounts to.
        trusted: whether these are enough (over half the repeats, or 50) not to rest on a few lucky trajectories, and
            what few repeats leave in J* is within its standard error.
        bias: that remainder, estimated generously: what J* loses or gains when it is made of half the repeats; with
            two or three repeats the jackknife's whole correction.
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
    bias: float = 0.0

    def _words(self) -> Iterable[str]:
        yield f"beta={self.beta:g}"
        yield f"J*={with_error(self.j, self.j_se)}"
        yield f"reward={with_error(self.reward, self.reward_se)}"
        yield f"path_kl={with_error(self.path_kl, self.path_kl_se)} nats"
        yield f"effective_samples={self.effective_samples:.3g}, {'trusted' if self.trusted else 'not trusted'}"


def bound(evaluation: Evaluation, beta: float, *, conditional: bool = True) -> Bound:
    """J* from trajectories of any control of the chain.

    Args:
        evaluation: with at least 2 repeats per start; at least 4 of them for a bound that can be trusted.
        beta: KL weight > 0.
        conditional: given x_0, as above. Otherwise −β log E e^{R/β} over all trajectories: a bound that is never too
            high and tight for a memoryless chain, and whose bias falls with all of them instead of the repeats.

    Raises:
        InvalidInputError: beta not positive and finite, or so small that R/β is not; a single trajectory per start;
            path KLs that are infinite.
    """
    check_type("conditional", conditional, bool, "take True or False")
    beta = check_number("beta", beta, 0, note=": without a KL there is no bound")
    log_weights, reward = _log_weights(evaluation, beta), evaluation.reward.double()
    repeats = reward.shape[1]
    if conditional:
        value, tilted = _jackknife(log_weights, reward)
        effective, enough = (1 / torch.softmax(log_weights, 1).square().sum(1)).mean().item(), (repeats + 1) / 2
        bias = beta * (value - _with_fewer(log_weights)).mean().item()
    else:
        value, tilted = _influence(log_weights, reward)
        error = mean_and_error(value)[1]
        effective, enough = (1 / torch.softmax(log_weights.flatten(), 0).square().sum()).item(), 50.0
        effective = min(effective, 1 / max(error**2, 1e-300))
        bias = beta * error**2 / 2
    j, j_se = mean_and_error(-beta * value)
    return Bound(
        beta,
        j,
        j_se,
        *mean_and_error(tilted),
        *mean_and_error(tilted / beta - value),
        effective_samples=effective,
        trusted=effective >= enough and abs(bias) <= j_se,
        bias=bias,
    )


def sharpest(before: Evaluation, after: Evaluation, beta: float) -> tuple[Bound, Literal["trained", "pretrained"]]:
    """The conditional bound from the chain that tells it best, and which that is; arguments as in `captured`.

    It is the one with more effective samples, the trained chain where both have as many. The pretrained one where the
    other's bound lies above J_before, which no bound does: log-mean-exp ≥ mean, so that its own never does.

    All is told on the noise of the two: J_before − J* = (J_before − J_after) + (J_after − J*), where the first is sharp
    without the control variate (`Evaluation.objective`) and the second with it. So J* here is the one of `bound`, and
    its reward, less what the control variate happened to be, whose mean is zero.

    Raises:
        InvalidInputError: as `captured`.
    """
    for name, given in (("before", before), ("after", after)):
        check_type(name, given, Evaluation, "take what evaluate(chain, reward, noise, ...) returns")
    if before.reward.shape[:1] != after.reward.shape[:1]:
        starts = f"{len(before.reward)} and {len(after.reward)}"
        raise InvalidInputError(f"before and after must hold the same starts, got {starts} of them")
    trained = _on_its_noise(after, beta)
    if before.reward.shape[1] < 2:  # it has no bound
        return trained, "trained"
    pretrained = bound(before, beta)
    fewer = trained.effective_samples < (1 - 1e-6) * pretrained.effective_samples
    if fewer or trained.j > before.objective(beta).double().mean().item():
        return pretrained, "pretrained"
    return trained, "trained"


def _on_its_noise(evaluation: Evaluation, beta: float) -> Bound:
    """The conditional bound less the mean of the control variate, as is J of the same trajectories."""
    value, tilted = _jackknife(_log_weights(evaluation, beta), evaluation.reward.double())
    chance = _chance(evaluation, beta)
    j, j_se = mean_and_error(-beta * value - chance)
    reward, reward_se = mean_and_error(tilted + chance)
    return replace(bound(evaluation, beta), j=j, j_se=j_se, reward=reward, reward_se=reward_se)


def _chance(evaluation: Evaluation, beta: float) -> Float[Tensor, " starts"]:
    """β Σ_k ⟨Δ_k, ξ_k⟩/s_k of every start, of mean zero: by this J with the control variate exceeds J without."""
    return beta * (evaluation.log_ratio.double() - evaluation.path_kl.double()).mean(1)


def gain(pretrained: Evaluation, beta: float, *, conditional: bool = True) -> tuple[float, float]:
    """E R under the optimal path law less E R of the pretrained chain, with the standard error of the difference.

    Both means are of the same trajectories, so most of what either is uncertain about cancels.

    Args:
        pretrained: of the pretrained chain.
        beta: KL weight > 0.
        conditional: as in `bound`.
    """
    check_type("conditional", conditional, bool, "take True or False")
    check_type("pretrained", pretrained, Evaluation, "take what evaluate(chain, reward, noise, ...) returns")
    beta, reward = check_number("beta", beta, 0), pretrained.reward.double()
    tilted = (_jackknife if conditional else _influence)(reward / beta, reward)[1]
    return mean_and_error(tilted - reward.mean(1))


def gain_of_j(pretrained: Evaluation, beta: float, *, conditional: bool = True) -> tuple[float, float]:
    """J of the pretrained chain less J*, with the standard error of the difference; arguments as in `gain`."""
    check_type("conditional", conditional, bool, "take True or False")
    check_type("pretrained", pretrained, Evaluation, "take what evaluate(chain, reward, noise, ...) returns")
    beta, reward = check_number("beta", beta, 0), pretrained.reward.double()
    value = (_jackknife if conditional else _influence)(reward / beta, reward)[0]
    return mean_and_error(beta * value - reward.mean(1))


def most_kl(pretrained: Evaluation, beta: float) -> float:
    """The path KL beyond which no control is as good as the pretrained chain, whatever it earns, from samples of that.

    One that is, J ≤ J_before, has β·KL ≤ E R − E_{u_0} R, and any at all has E R − β'·KL ≤ −J*(β'). So for β' < β

        KL ≤ (J_before − J*(β')) / (β − β').

    The least of these is taken, over several β' and both bounds on J that can be trusted there, with two standard
    errors. For a Gaussian reward that forgets x_0 it is attained at β' = β/2: four times the path KL of the optimum.

    Args:
        pretrained: of the pretrained chain, with at least 2 repeats per start.
        beta: KL weight > 0.

    Returns:
        The path KL in nats; infinite where no bound can be trusted.
    """
    beta, before, found = check_number("beta", beta, 0), -mean_and_error(pretrained.reward)[0], math.inf
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        for best in (bound(pretrained, share * beta, conditional=given) for given in (True, False)):
            if best.trusted:
                found = min(found, (before - best.j + 2 * best.j_se) / ((1 - share) * beta))
    return found


def possible(before: Evaluation, after: Evaluation, beta: float) -> tuple[float, float]:
    """J_before − J*, what any fine-tuning could gain, with its standard error; arguments as in `captured`."""
    return mean_and_error(_gained_and_possible(before, after, beta)[1])


def captured(before: Evaluation, after: Evaluation, beta: float) -> tuple[float, float]:
    """The share (J_before − J_after)/(J_before − J*) of the possible gain, with its standard error.

    Both differences are sharp. Before and after share their noise, so the numerator is paired. J* is the `sharpest`,
    from the trajectories of one of the two, on their noise, and J of these less J* is the mean of −β times a log-weight
    against its soft maximum.

    Args:
        before: the pretrained chain.
        after: the trained one under the same noise, with at least 2 repeats per start.
        beta: KL weight > 0.

    Raises:
        InvalidInputError: as `bound`; other starts before than after.
    """
    gained, total = _gained_and_possible(before, after, beta)
    share = gained.mean() / total.mean()
    return share.item(), mean_and_error((gained - share * total) / total.mean().abs())[1]


def _gained_and_possible(
    before: Evaluation, after: Evaluation, beta: float
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """J_before − J_after and J_before − J* of every start."""
    beta = check_number("beta", beta, 0, note=": without a KL there is no bound")
    chosen = {"trained": after, "pretrained": before}[sharpest(before, after, beta)[1]]
    best = -beta * _jackknife(_log_weights(chosen, beta), chosen.reward.double())[0] - _chance(chosen, beta)
    start = before.objective(beta).double().mean(1)
    return start - after.objective(beta).double().mean(1), start - best


def _log_weights(evaluation: Evaluation, beta: float) -> Float[Tensor, "starts repeats"]:
    """R/β − log dP_θ/dP_0 of every trajectory, or the word for why there is no bound."""
    check_type("evaluation", evaluation, Evaluation, "take what evaluate(chain, reward, noise, ...) returns")
    if evaluation.reward.shape[1] < 2:
        raise InvalidInputError("evaluation must hold at least 2 trajectories per start, got 1; pass repeats=8, say")
    if not evaluation.log_ratio.isfinite().all():
        raise InvalidInputError(
            "evaluation holds path KLs that are infinite or NaN: a trained row of its chain has no noise; keep the "
            "pretrained network there, pretrained_rows='noiseless', or evaluate the pretrained chain"
        )
    log_weights = evaluation.reward.double() / beta - evaluation.log_ratio.double()
    if not log_weights.isfinite().all():
        raise InvalidInputError(f"reward / beta must be finite, but rewards are not or beta is too small, {beta}")
    return log_weights


def memory_of_start(values: Float[Tensor, "starts repeats"]) -> tuple[float, float]:
    """Var E[R|x_0] / Var R, the share of the variance that x_0 decides (0: memoryless), with its standard error.

    One-way analysis of variance: the mean square between starts holds 1/repeats of the variance within, which is
    subtracted. The error is a jackknife over starts.

    Raises:
        InvalidInputError: fewer than 3 starts or 2 repeats, or values that do not vary.
    """
    check_tensor("values", values, "starts repeats")
    values = values.double()
    if values.shape[0] < 3 or values.shape[1] < 2:
        raise InvalidInputError(f"values must hold at least 3 starts with 2 repeats each, got {tuple(values.shape)}")
    if not values.std() > 0:
        raise InvalidInputError(f"values must vary, and be finite; the first is {values[0, 0].item():g}")
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
    top, leader = log_weights.max(1, keepdim=True)
    w = (log_weights - top).exp()
    total, weighted = w.sum(1, keepdim=True), (w * reward).sum(1, keepdim=True)
    # What is left without the leader may be less than the leader's rounding, or than any number: it has a scale of its
    # own. Without any other it holds the leader, and the difference keeps its digits.
    others = log_weights.scatter(1, leader, -math.inf)
    log_total_left = (total - w).log().scatter(1, leader, others.logsumexp(1, keepdim=True) - top)
    led = (others.softmax(1) * reward).sum(1, keepdim=True)
    tilted_left = ((weighted - w * reward) / (total - w)).scatter(1, leader, led)

    def corrected(full: Tensor, left_out: Tensor) -> Tensor:
        return (repeats * full[:, 0]) - (repeats - 1) * left_out.mean(1)

    value = corrected((total / repeats).log(), log_total_left - math.log(repeats - 1)) + top[:, 0]
    return value, corrected(weighted / total, tilted_left)


def _with_fewer(log_weights: Float[Tensor, "starts repeats"]) -> Float[Tensor, " starts"]:
    """For every start log E e^w from half the repeats, the mean over both; of 2 or 3 repeats without the jackknife."""
    half = log_weights.shape[1] // 2
    if half < 2:
        return log_weights.logsumexp(1) - math.log(log_weights.shape[1])
    parts = torch.cat([log_weights[:, :half], log_weights[:, half : 2 * half]])
    return _jackknife(parts, parts)[0].view(2, -1).mean(0)


def _influence(
    log_weights: Float[Tensor, "starts repeats"], reward: Float[Tensor, "starts repeats"]
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """The same over all trajectories at once, as one number per start: their mean is it, their spread its error."""
    value = log_weights.logsumexp((0, 1)) - math.log(log_weights.numel())
    w = (log_weights - value).exp()  # of mean one
    tilted = (w * reward).mean()
    return value + (w - 1).mean(1), tilted + (w * (reward - tilted)).mean(1)
