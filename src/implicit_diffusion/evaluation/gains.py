"""What tilting can gain, in reward and in J, and which share of it a training has captured.

Differences of means over the same trajectories are known more sharply than either mean: most of the noise cancels.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_number, check_tensor, check_type
from implicit_diffusion.evaluation.bounds import sharpest
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mean_and_error
from implicit_diffusion.evaluation.soft_values import control_variate, influence, jackknife, log_weights_of


def gain(
    pretrained: Evaluation,
    beta: float,
    *,
    conditional: bool = True,
    of: Float[Tensor, "starts repeats"] | None = None,
) -> tuple[float, float]:
    """E R under the optimal path law less E R of the pretrained chain, with the standard error of the difference.

    Both means are over the same trajectories, so that most of their noise cancels.

    Args:
        pretrained: evaluation of the pretrained chain.
        beta: KL weight > 0.
        conditional: as in `bounds.bound`.
        of: another number of every trajectory, whose mean is compared in place of that of R; the law stays that of R.
    """
    check_type("conditional", conditional, bool, "use True or False")
    check_type("pretrained", pretrained, Evaluation, "pass what evaluate(chain, reward, noise, ...) returns")
    beta, reward = check_number("beta", beta, 0), pretrained.reward.double()
    value = reward if of is None else check_tensor("of", of, "starts repeats").double()
    tilted = (jackknife if conditional else influence)(reward / beta, value)[1]
    return mean_and_error(tilted - value.mean(1))


def gain_of_j(pretrained: Evaluation, beta: float, *, conditional: bool = True) -> tuple[float, float]:
    """J of the pretrained chain less J*, with the standard error of the difference; arguments as in `gain`."""
    check_type("conditional", conditional, bool, "use True or False")
    check_type("pretrained", pretrained, Evaluation, "pass what evaluate(chain, reward, noise, ...) returns")
    beta, reward = check_number("beta", beta, 0), pretrained.reward.double()
    value = (jackknife if conditional else influence)(reward / beta, reward)[0]
    return mean_and_error(beta * value - reward.mean(1))


def possible(before: Evaluation, after: Evaluation, beta: float) -> tuple[float, float]:
    """J_before − J*, the most that fine-tuning could gain, with its standard error; arguments as in `captured`."""
    return mean_and_error(_gained_and_possible(before, after, beta)[1])


def captured(before: Evaluation, after: Evaluation, beta: float) -> tuple[float, float]:
    """The share (J_before − J_after)/(J_before − J*) of the possible gain, with its standard error.

    Both differences are sharp: before and after share their noise, so that the numerator is a paired difference, and
    J* is estimated from the trajectories of one of the two (`bounds.sharpest`).

    Args:
        before: evaluation of the pretrained chain.
        after: evaluation of the trained chain under the same noise, with at least 2 repeats per start.
        beta: KL weight > 0.

    Raises:
        InvalidInputError: as `bounds.bound`; before and after have different numbers of starts.
    """
    return share_of(*_gained_and_possible(before, after, beta))


def share_of(part: Float[Tensor, " starts"], whole: Float[Tensor, " starts"]) -> Estimate:
    """The mean of a part as a share of that of the whole, with its standard error (the delta method)."""
    share = part.mean() / whole.mean()
    return Estimate(share.item(), mean_and_error((part - share * whole) / whole.mean().abs()).error)


def _gained_and_possible(
    before: Evaluation, after: Evaluation, beta: float
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """J_before − J_after and J_before − J* of every start."""
    beta = check_number("beta", beta, 0, note=": without a KL there is no bound")
    chosen = {"trained": after, "pretrained": before}[sharpest(before, after, beta)[1]]
    best = -beta * jackknife(log_weights_of(chosen, beta), chosen.reward.double())[0] - control_variate(chosen, beta)
    start = before.objective(beta).double().mean(1)
    return start - after.objective(beta).double().mean(1), start - best


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
