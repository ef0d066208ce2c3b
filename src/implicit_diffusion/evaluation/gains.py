r"""What tilting can gain, in reward and in J, and which share of it a training has captured, or the weights capture.

Differences of means over the same trajectories are known more sharply than either mean: most of the noise cancels.

**By weights.** Weighted (`tilting`), trajectories of the trained chain stand for P* given x_0, the law that attains J*:
what training has left of the possible gain is in the weights. A judgement has drawn these trajectories already, so that
the weighted law costs nothing, at the β of the training and at every other one that they still reach. Per start, with
log Z and r = E* R by the jackknife (`soft_values`), R_0 of the pretrained chain on the same noise, and the control
variate v = Σ_k ⟨Δ_k, ξ_k⟩/s_k of mean zero,

    reward gained  r − R_0,        path KL  r/β − log Z − v,        fall of J  β (log Z + v) − R_0,

in each of which the noise cancels where the drift is the optimum (`bounds.on_its_noise`).

The weighted law captures all of the possible gain, exactly; measured on the very trajectories that J* is made of, it
does so whatever they are. So its share compares two estimates of J_0 − J* that have no trajectory in common: by the
weights of the first half of every start's trajectories, and by those of the second; or, where the bound is that of the
pretrained chain, by the trajectories of either. How far it is from one, within its error, is what so many trajectories
leave to chance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_number, check_tensor, check_type
from implicit_diffusion.evaluation.bounds import check_same_starts, on_its_noise, sharpest
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mapped, mean_and_error
from implicit_diffusion.evaluation.soft_values import control_variate, influence, jackknife, log_weights_of
from implicit_diffusion.showing import Shown, with_error


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


def possible(
    before: Evaluation, after: Evaluation, beta: float, untrained: Evaluation | None = None
) -> tuple[float, float]:
    """J_begun − J*, the most that fine-tuning could gain, with its standard error; arguments as in `captured`."""
    return mean_and_error(_gained_and_possible(before, after, beta, untrained)[1])


def captured(
    before: Evaluation, after: Evaluation, beta: float, untrained: Evaluation | None = None
) -> tuple[float, float]:
    """The share (J_begun − J_after)/(J_begun − J*) of the possible gain, with its standard error.

    Training begins with the pretrained chain, or with the untrained one: where the pretrained chain is guided and the
    trained one is not, J_begun has the path KL of guidance.

    Both differences are sharp: before and after share their noise, so that the numerator is a paired difference, and
    J* is estimated from the trajectories of one of the two (`bounds.sharpest`).

    Args:
        before: evaluation of the pretrained chain.
        after: evaluation of the trained chain under the same noise, with at least 2 repeats per start.
        beta: KL weight > 0.
        untrained: evaluation under the same noise of the chain that training began with; None for `before`.

    Raises:
        InvalidInputError: as `bounds.bound`; evaluations have different numbers of starts.
    """
    return share_of(*_gained_and_possible(before, after, beta, untrained))


def share_of(part: Float[Tensor, " starts"], whole: Float[Tensor, " starts"]) -> Estimate:
    """The mean of a part as a share of that of the whole, with its standard error (the delta method)."""
    share = part.mean() / whole.mean()
    return Estimate(share.item(), mean_and_error((part - share * whole) / whole.mean().abs()).error)


def _gained_and_possible(
    before: Evaluation, after: Evaluation, beta: float, untrained: Evaluation | None
) -> tuple[Float[Tensor, " starts"], Float[Tensor, " starts"]]:
    """J_begun − J_after and J_begun − J* of every start."""
    beta = check_number("beta", beta, 0, note=": without a KL there is no bound")
    chosen = {"trained": after, "pretrained": before}[sharpest(before, after, beta)[1]]
    begun = _begun(before, untrained)
    start = begun.objective(beta).double().mean(1)
    return start - after.objective(beta).double().mean(1), possible_by(chosen, begun, beta)


def _begun(before: Evaluation, untrained: Evaluation | None) -> Evaluation:
    """The chain that training began with."""
    if untrained is None:
        return before
    check_type("untrained", untrained, Evaluation, "pass what evaluate(chain, reward, noise, ...) returns")
    if untrained.reward.shape[:1] != before.reward.shape[:1]:
        starts = f"{len(untrained.reward)} and {len(before.reward)}"
        raise InvalidInputError(f"untrained and before must hold the same starts, got {starts} of them")
    return untrained


def possible_by(weighed: Evaluation, begun: Evaluation, beta: float) -> Float[Tensor, " starts"]:
    """J_begun − J* of every start, by the weights of the trajectories of `weighed`, on the noise of both."""
    value = jackknife(log_weights_of(weighed, beta), weighed.reward.double())[0]
    return begun.objective(beta).double().mean(1) + beta * value + control_variate(weighed, beta)


@dataclass(frozen=True, repr=False)
class Reweighted(Shown):
    """The law P* given x_0, from trajectories of the trained chain.

    Args:
        kl_weight: β, in reward per nat.
        reward: E* R.
        reward_gain: the paired difference from the pretrained chain.
        path_kl: of P* to the pretrained path law, in nats.
        j: of P*, which is J*.
        j_fall: the paired difference from the chain that training began with.
        effective_share: effective trajectories of a start, as a share of all.
        trusted: whether that is enough, and the bias that few of them leave within the error (`bounds.Bound`).
    """

    kl_weight: float
    reward: Estimate
    reward_gain: Estimate
    path_kl: Estimate
    j: Estimate
    j_fall: Estimate
    effective_share: float
    trusted: bool

    def _words(self) -> Iterable[str]:
        yield f"kl_weight={self.kl_weight:g}"
        yield f"reward={with_error(*self.reward)}"
        yield f"path_kl={with_error(*self.path_kl)} nats"
        yield f"effective_share={self.effective_share:.3g}{'' if self.trusted else ', not trusted'}"


def reweighted(before: Evaluation, after: Evaluation, beta: float, untrained: Evaluation | None = None) -> Reweighted:
    """The tilted law of any β from the trajectories of a judgement.

    Args:
        before: evaluation of the pretrained chain.
        after: evaluation of the trained chain under the same noise, with at least 2 repeats per start.
        beta: KL weight > 0, that of the training or another one.
        untrained: as in `captured`.

    Raises:
        InvalidInputError: as `bounds.bound`; before and after have different numbers of starts.
    """
    beta = check_number("beta", beta, 0, note=": without a KL nothing is tilted")
    check_same_starts(before, after)
    law = on_its_noise(after, beta)
    tilted = jackknife(log_weights_of(after, beta), after.reward.double())[1]
    return Reweighted(
        beta,
        reward=Estimate(law.reward, law.reward_se),
        reward_gain=mean_and_error(tilted - before.reward.double().mean(1)),
        path_kl=Estimate(law.path_kl, law.path_kl_se),
        j=Estimate(law.j, law.j_se),
        j_fall=mean_and_error(possible_by(after, _begun(before, untrained), beta)),
        effective_share=law.effective_samples / after.reward.shape[1],
        trusted=law.trusted,
    )


def captured_by_weights(
    before: Evaluation, after: Evaluation, beta: float, untrained: Evaluation | None = None
) -> Estimate:
    """The share of the possible gain that the weighted trained chain captures: one, within its standard error.

    Arguments and errors as in `captured`, with at least 4 repeats per start, of which there are two halves.
    """
    beta = check_number("beta", beta, 0, note=": without a KL there is no bound")
    begun = _begun(before, untrained)
    if sharpest(before, after, beta)[1] == "pretrained":
        return share_of(possible_by(after, begun, beta), possible_by(before, begun, beta))
    half = after.reward.shape[1] // 2
    if half < 2:
        raise InvalidInputError(
            f"after must hold at least 4 trajectories per start, 2 in either half, got {after.reward.shape[1]}"
        )
    first, second = slice(half), slice(half, 2 * half)
    part, whole = (possible_by(_repeats(after, each), _repeats(begun, each), beta) for each in (first, second))
    return share_of(part, whole)


def _repeats(evaluation: Evaluation, which: slice) -> Evaluation:
    """Some of the trajectories of every start, without their samples."""
    return mapped(lambda values: values[:, which], replace(evaluation, samples=evaluation.reward))


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
