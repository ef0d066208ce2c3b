"""How good can fine-tuning get? The bound J* and the law that attains it, from samples alone.

Whatever the control, J = −E R + β·KL(path) cannot go below the soft value of the pretrained chain,

    J ≥ J* = E_{x_0}[ −β log E_{u_0}( e^{R(x_N)/β} | x_0 ) ] ≥ −β log E_{u_0} e^{R(x_N)/β}

(Donsker and Varadhan's variational formula, given x_0, whose law is not controlled). The tilted path law
dP* ∝ e^{R/β} dP_0 attains J*; its reward and KL are the frontier that a run can approach as N grows.

The expectations may be taken under any control with importance weights: E_{u_0}[e^{R/β}|x_0] = E_{u_θ}[e^w|x_0] with
w = R/β − log dP_θ/dP_0. Under the pretrained chain (w = R/β) this plans a run before any training; under the trained
one the weights are nearly constant, and the same number of trajectories gives a much sharper J*.

A chain that training has ruined yields a worse estimate than the pretrained one, whose J* never lies above its own J:
`sharpest` uses whichever of the two has more effective samples.

With M trajectories per x_0 a log-mean-exp is biased by O(1/M), and `soft_values.jackknife` removes the first order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from implicit_diffusion.errors import InvalidInputError, check_number, check_type
from implicit_diffusion.evaluation.chains import Evaluation, mean_and_error
from implicit_diffusion.evaluation.soft_values import control_variate, from_half, influence, jackknife, log_weights_of
from implicit_diffusion.showing import Shown, with_error


@dataclass(frozen=True, repr=False)
class Bound(Shown):
    """The optimum of J = −E R + β·KL over all controls, each number with its standard error.

    Args:
        beta: KL weight, in reward per nat.
        j: J*.
        reward: E R under the optimal path law.
        path_kl: its KL to the pretrained path, in nats.
        effective_samples: 1/Σw² of the importance weights. For a conditional bound, the mean over the starts of the
            number within a start. For an unconditional one, the number among all trajectories, or the smaller number
            that the standard error over starts amounts to.
        trusted: whether there are enough of them (more than half the repeats, or 50), so that the bound does not rest
            on a few lucky trajectories, and whether `bias` is within the standard error of J*.
        bias: estimate, on the large side, of the bias that few repeats leave in J*: the change of J* when it is made of
            half the repeats; with two or three repeats, the whole correction of the jackknife.
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
    """J*, from trajectories of the chain under any control.

    Args:
        evaluation: with at least 2 repeats per start, and at least 4 for a bound that can be trusted.
        beta: KL weight > 0.
        conditional: True for the bound given x_0, as above; False for −β log E e^{R/β} over all trajectories, which is
            never too high, is tight for a memoryless chain, and has a bias that falls with the number of all
            trajectories instead of that of the repeats.

    Raises:
        InvalidInputError: beta is not positive and finite, or so small that R/β overflows; there is a single trajectory
            per start; path KLs are infinite.
    """
    check_type("conditional", conditional, bool, "use True or False")
    beta = check_number("beta", beta, 0, note=": without a KL there is no bound")
    log_weights, reward = log_weights_of(evaluation, beta), evaluation.reward.double()
    repeats = reward.shape[1]
    if conditional:
        value, tilted = jackknife(log_weights, reward)
        effective, enough = (1 / torch.softmax(log_weights, 1).square().sum(1)).mean().item(), (repeats + 1) / 2
        bias = beta * (value - from_half(log_weights)).mean().item()
    else:
        value, tilted = influence(log_weights, reward)
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
    """The conditional bound from the chain that yields the sharper one, and the name of that chain.

    That is the chain with more effective samples; the trained one where both have the same number. The pretrained one
    also where the bound of the trained chain lies above J_before, which no true bound does: the pretrained chain's own
    never does, since log-mean-exp ≥ mean.

    The estimate refers to the noise that both chains share (`on_its_noise`).

    Arguments as in `gains.captured`.

    Raises:
        InvalidInputError: as `gains.captured`.
    """
    check_same_starts(before, after)
    trained = on_its_noise(after, beta)
    if before.reward.shape[1] < 2:  # too few for a bound of its own
        return trained, "trained"
    pretrained = bound(before, beta)
    fewer = trained.effective_samples < (1 - 1e-6) * pretrained.effective_samples
    if fewer or trained.j > before.objective(beta).double().mean().item():
        return pretrained, "pretrained"
    return trained, "trained"


def check_same_starts(before: Evaluation, after: Evaluation) -> None:
    """Raise `InvalidInputError` unless these are evaluations with the same number of starts."""
    for name, given in (("before", before), ("after", after)):
        check_type(name, given, Evaluation, "pass what evaluate(chain, reward, noise, ...) returns")
    if before.reward.shape[:1] != after.reward.shape[:1]:
        starts = f"{len(before.reward)} and {len(after.reward)}"
        raise InvalidInputError(f"before and after must hold the same starts, got {starts} of them")


def on_its_noise(evaluation: Evaluation, beta: float) -> Bound:
    """The conditional bound, for differences from chains under the same noise.

    In J_before − J* = (J_before − J) + (J − J*) the first difference is sharp without the control variate
    (`Evaluation.objective`), the second with it. So J* and its path KL are those of `bound` less the sample mean of the
    control variate, whose expectation is zero. The reward shares its noise with those of the other chains as it is.
    """
    value, tilted = jackknife(log_weights_of(evaluation, beta), evaluation.reward.double())
    variate = control_variate(evaluation, beta)
    j, j_se = mean_and_error(-beta * value - variate)
    kl, kl_se = mean_and_error((tilted - variate) / beta - value)
    return replace(bound(evaluation, beta), j=j, j_se=j_se, path_kl=kl, path_kl_se=kl_se)


def most_kl(pretrained: Evaluation, beta: float, above: float = 0.0) -> float:
    """The path KL beyond which no control has a J as low as the pretrained chain's, from samples of the latter.

    A control with J ≤ J_before + c, where c = `above`, has β·KL ≤ E R − E_{u_0} R + c, and every control has
    E R − β'·KL ≤ −J*(β'). So for β' < β

        KL ≤ (J_before + c − J*(β')) / (β − β').

    The result is the smallest of these limits over several β' and both kinds of bound, where they can be trusted, each
    with two standard errors added. For a Gaussian reward that does not depend on x_0 the smallest is at β' = β/2: four
    times the path KL of the optimum.

    Args:
        pretrained: of the pretrained chain, with at least 2 repeats per start.
        beta: KL weight > 0.
        above: how much J may be above that of the pretrained chain, such as by what guidance costs.

    Returns:
        The path KL in nats; infinite where no bound can be trusted.
    """
    beta, above, limit = check_number("beta", beta, 0), check_number("above", above), math.inf
    before = above - mean_and_error(pretrained.reward)[0]
    for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        for best in (bound(pretrained, share * beta, conditional=given) for given in (True, False)):
            if best.trusted:
                limit = min(limit, (before - best.j + 2 * best.j_se) / ((1 - share) * beta))
    return limit
