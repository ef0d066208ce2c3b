r"""Averages over the tilted law itself, from trajectories of any control and their importance weights.

Fine-tuning with β aims at dP* ∝ e^{R(x_N)/β} dP_0, which a chain of Gaussian rows only comes near. The rest is in the
weights. For a trajectory of u_θ, with Δ_k = b_k (u_θ − u_0)(x_k) and up to a constant,

    log w = log dP*/dP_θ = R(x_N)/β − Σ_k [⟨Δ_k, ξ_k⟩/s_k + ‖Δ_k‖²/(2 s_k²)],        E* φ = E_θ[w φ]/E_θ[w],

exactly, whatever u_θ is and whether or not R has a gradient. Under a trained chain w is nearly constant; under the
pretrained one it is e^{R/β}. Two laws go by the name of P*, and they agree where the chain is memoryless:

    given      tilted given x_0 and its condition, whose law stays: what fine-tuning aims at; J* is its value
    tilted     x_0 is tilted as well, given its condition: its outputs have the law π* ∝ π_0 e^{R/β}

Weights compare the trajectories of one *population*: of one start, or of all starts with the same condition. A ratio of
means over M of them has a bias of order 1/M.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_choice, check_number, check_tensor
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mean_and_error
from implicit_diffusion.evaluation.soft_values import log_weights_of
from implicit_diffusion.showing import Shown, with_error

Start = Literal["given", "tilted"]
STARTS = ("given", "tilted")
ENOUGH = 50.0  # effective trajectories of a population on which a number may rest, or half of them where it is small


@dataclass(frozen=True, repr=False)
class TiltedLaw(Shown):
    """The tilted law, as weighted trajectories.

    Args:
        beta: KL weight, in reward per nat.
        weights: w of every trajectory, of mean one in every population.
        population: the number of each start's population.
        reward: E* R.
        path_kl: of P* to the pretrained path law, in nats; with that of x_0 where x_0 is tilted.
        log_normaliser: E log E_{u_0}[e^{R/β}|·], given what is not tilted.
        effective_share: effective trajectories, (Σw)²/Σw², as a share of a population; the mean over the starts.
        trusted: whether populations hold enough effective trajectories: half of them, or `ENOUGH`.
    """

    beta: float
    weights: Float[Tensor, "starts repeats"]
    population: Int[Tensor, " starts"]
    reward: Estimate
    path_kl: Estimate
    log_normaliser: Estimate
    effective_share: float
    trusted: bool

    def _words(self) -> Iterable[str]:
        yield f"beta={self.beta:g}"
        yield f"reward={with_error(*self.reward)}"
        yield f"path_kl={with_error(*self.path_kl)} nats"
        yield f"effective_share={self.effective_share:.3g}{'' if self.trusted else ', not trusted'}"

    def average(self, values: Float[Tensor, "starts repeats"]) -> Estimate:
        """E* of values of the trajectories, with its standard error over the starts (by the influence function)."""
        check_tensor("values", values, "starts repeats")
        if values.shape != self.weights.shape:
            raise InvalidInputError(
                f"values must have the shape of the trajectories, {tuple(self.weights.shape)}, got "
                f"{tuple(values.shape)}"
            )
        return mean_and_error(_averaged(self.weights, values.double(), self.population))


def tilted_law(
    evaluation: Evaluation, beta: float, *, start: Start = "given", condition: Int[Tensor, " starts"] | None = None
) -> TiltedLaw:
    """The tilted law from trajectories of the pretrained chain, of the trained one, or of any other control.

    Args:
        evaluation: with at least 2 repeats per start where x_0 is given.
        beta: KL weight > 0.
        start: what is tilted; see above.
        condition: the number of each start's condition, which stays as it is where x_0 is tilted; None where all starts
            have the same one.

    Raises:
        InvalidInputError: beta is not positive and finite, or so small that R/β overflows; too few repeats; path KLs
            that are infinite; a condition with x_0 given, or of another shape.
    """
    beta = check_number("beta", beta, 0, note=": without a KL nothing is tilted")
    check_choice("start", start, STARTS)
    log_weights = log_weights_of(evaluation, beta, least=2 if start == "given" else 1)
    population = _populations(len(log_weights), start, condition).to(log_weights.device)
    return weighted_law(log_weights, evaluation.reward.double(), beta, population)


def weighted_law(
    log_weights: Float[Tensor, "starts repeats"],
    reward: Float[Tensor, "starts repeats"],
    beta: float,
    population: Int[Tensor, " starts"],
    carried: Float[Tensor, " starts"] | float = 0.0,
) -> TiltedLaw:
    """The tilted law of trajectories with these weights; each population is one start, or some of the starts.

    Args:
        log_weights: log w.
        reward: R of every trajectory.
        beta: KL weight.
        population: the number of each start's population, from 0 on.
        carried: the logarithm of the mean weights that earlier resamplings have divided out.
    """
    value = _log_mean_exp(log_weights, population)[population]
    w = (log_weights - value[:, None]).exp()
    r = _averaged(w, reward, population)
    z = carried + value + (w - 1).mean(1)
    size = population.bincount()[population] * w.shape[1]
    effective = size / _mean_in_each(w.square(), population)[population]
    return TiltedLaw(
        beta,
        w,
        population,
        reward=mean_and_error(r),
        path_kl=mean_and_error(r / beta - z),
        log_normaliser=mean_and_error(z),
        effective_share=(effective / size).mean().item(),
        trusted=bool((effective >= (size / 2).clamp(max=ENOUGH)).double().mean() > 0.5),
    )


def tilt_of(reward: Float[Tensor, "*shape"], beta: float) -> Float[Tensor, "*shape"]:
    """R/β.

    Raises:
        InvalidInputError: it overflows.
    """
    tilt = reward / beta
    if not tilt.isfinite().all():
        raise InvalidInputError(f"reward / beta must be finite, and beta = {beta} is too small")
    return tilt


def _populations(starts: int, start: Start, condition: Tensor | None) -> Int[Tensor, " starts"]:
    if condition is None:
        return torch.arange(starts) if start == "given" else torch.zeros(starts, dtype=torch.long)
    if start == "given":
        raise InvalidInputError("condition is for start='tilted': given x_0, every start is a population of its own")
    if not isinstance(condition, Tensor) or condition.shape != (starts,) or condition.is_floating_point():
        given = tuple(condition.shape) if isinstance(condition, Tensor) else type(condition).__name__
        raise InvalidInputError(f"condition must be a tensor of {starts} integers, one per start, got {given}")
    return condition.unique(return_inverse=True)[1]


def _mean_in_each(values: Float[Tensor, "starts repeats"], population: Int[Tensor, " starts"]) -> Float[Tensor, " n"]:
    """The mean over every population."""
    count = population.bincount()
    return torch.zeros_like(count, dtype=values.dtype).index_add(0, population, values.mean(1)) / count


def _log_mean_exp(log_weights: Tensor, population: Tensor) -> Float[Tensor, " n"]:
    """Log of the mean of e^A over every population."""
    top = torch.full_like(population.bincount(), -torch.inf, dtype=log_weights.dtype)
    top = top.scatter_reduce(0, population, log_weights.amax(1), "amax")
    return _mean_in_each((log_weights - top[population][:, None]).exp(), population).log() + top


def _averaged(w: Tensor, values: Tensor, population: Tensor) -> Float[Tensor, " starts"]:
    """The weighted mean of every population, as one number per start whose spread tells its error."""
    mean = _mean_in_each(w * values, population)[population]
    return mean + (w * (values - mean[:, None])).mean(1)
