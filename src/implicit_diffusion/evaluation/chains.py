"""The value of a chain: reward and path KL on noise that training never sees.

Along a trajectory of u_θ, with Δ_k = b_k (u_θ − u_0)(m_k x_k, t_k), the log-likelihood ratio to the pretrained path is

    log dP_θ/dP_0 = Σ_k ‖Δ_k‖²/(2 s_k²) + ⟨Δ_k, ξ_k⟩/s_k

The first sum has the path KL as its mean, the second has mean zero. So J = β·KL − E R has two estimates. The one from
the first sum alone agrees to the digit with the path KL and the reward that are printed beside it, and chains that
share their noise share the noise of their rewards, so that J before less J after is sharp. With the second sum as a
control variate, J does not vary at all under the best u_θ given x_0: its level, and its distance from the bound J*, are
the sharper the better the training (`implicit_diffusion.evaluation.bounds`). J in reports is the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.denoisers.sharded import is_sharded
from implicit_diffusion.errors import check_call, check_integer, check_number, check_tensor, check_type, trying
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives.path import squared_norm
from implicit_diffusion.objectives.reward import Reward, as_reward
from implicit_diffusion.objectives.weighted_rewards import WeightedRewards
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown, mean_with_error, of_tensor, with_error

NUMBERS = 2**18  # in the states of one network call


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """Trajectories from `starts` initial noises, `repeats` from each.

    Args:
        reward: R(x_N).
        path_kl: Σ_k ‖Δ_k‖²/(2 s_k²) along each trajectory, in nats; infinite where a trained row has no noise.
        log_ratio: log dP_θ/dP_0 of each trajectory, in nats; NaN where a trained row has no noise.
        samples: x_N; after `stored.Stored`, only those of the first starts and the first repeat.
        rewards: those that R is made of (`objectives.WeightedRewards`); None where it is one reward.
    """

    reward: Float[Tensor, "starts repeats"]
    path_kl: Float[Tensor, "starts repeats"]
    log_ratio: Float[Tensor, "starts repeats"]
    samples: Float[Tensor, "shown_starts shown_repeats *event"]
    rewards: Float[Tensor, "starts repeats rewards"] | None = None

    def _words(self) -> Iterable[str]:
        starts, repeats = self.reward.shape
        yield f"{starts} starts × {repeats}"
        yield f"reward={mean_with_error(self.reward)}"
        yield f"path_kl={mean_with_error(self.path_kl)} nats"
        yield f"samples={of_tensor(self.samples[0, 0])}"
        if self.rewards is not None:
            yield f"{self.rewards.shape[-1]} rewards"

    @property
    def each_reward(self) -> tuple[Float[Tensor, "starts repeats"], ...]:
        """The rewards that R is made of; R alone where it is one reward."""
        return (self.reward,) if self.rewards is None else self.rewards.unbind(-1)

    def objective(self, beta: float, *, control_variate: bool = False) -> Float[Tensor, "starts repeats"]:
        """β·path_kl − R of every trajectory, whose mean is J = β·KL(path) − E R.

        Args:
            beta: weight of the path KL, in reward per nat.
            control_variate: use the log-ratio in place of the path KL. The mean is the same. Near an optimum its
                standard error is smaller, while differences from another chain on the same noise are less sharp.
        """
        kl = self.log_ratio if control_variate else self.path_kl
        return check_number("beta", beta) * kl - self.reward


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float

    def __repr__(self) -> str:
        return f"Estimate({with_error(self.mean, self.error)})"


def mean_and_error(values: Float[Tensor, "starts *repeats"]) -> Estimate:
    """Mean and its standard error; trajectories from one start are not independent, so starts are the unit.

    The error is NaN where there is a single start.
    """
    check_tensor("values", values, "starts ...")
    per_start = values.reshape(len(values), -1).mean(1).double()
    error = per_start.std() / len(per_start) ** 0.5 if len(per_start) > 1 else torch.tensor(float("nan"))
    return Estimate(per_start.mean().item(), error.item())


def evaluate(
    chain: Chain,
    reward: Callable[..., Any] | Reward,
    noise: Noise,
    *,
    starts: int,
    repeats: int = 1,
    chunk: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Sample a chain and score its samples.

    Two chains evaluated under the same noise share x_0, its condition and every ξ_k, so that their differences are
    sharp. A start is an x_0 with its condition: all of its repeats have the same prompt. Several processes share the
    work, if all of them call this alike; each gets the numbers that one process would compute, to the bit.

    Args:
        chain: the sampler. A chain whose denoiser is its own reference has log-ratio zero and costs one network call
            per step.
        reward: R, (n, *event) → (n,); for conditions and other forms see `Reward`. A few samples are used first to
            check that each reward depends on its own sample alone, unless it is a `Reward` that is `checked`.
        noise: of the evaluation; use `Noise(seed).stream(1)` to keep it apart from training.
        starts: number of independent x_0.
        repeats: number of trajectories from each x_0; the conditional bound needs several.
        chunk: number of trajectories in one network call, rounded down to whole starts; by default 256 small ones,
            fewer if they are large. The random numbers depend on it.
        progress: called with the number of trajectories just completed.

    Raises:
        InvalidInputError: starts, repeats or chunk below one; rewards that are not one number per sample, or that
            depend on other samples than their own.
        NonFiniteError: rewards that are NaN or infinite.
    """
    check_call("progress", progress, "done")
    parts: list[Evaluation] = []
    for part in evaluate_in_parts(chain, reward, noise, starts=starts, repeats=repeats, chunk=chunk):
        parts.append(part)
        progress(part.reward.numel())
    return joined(parts)


def evaluate_in_parts(
    chain: Chain,
    reward: Callable[..., Any] | Reward,
    noise: Noise,
    *,
    starts: int,
    repeats: int = 1,
    chunk: int | None = None,
    first: int = 0,
) -> Iterator[Evaluation]:
    """The parts that `evaluate` joins, one network batch each; between two parts, networks are in their own modes.

    A part depends on its number alone, also in what a reward draws from the global generators: an evaluation can
    continue with part `first` and gets the same numbers. Several processes compute different parts, each by itself, and
    all get all of them. Other arguments and errors as in `evaluate`.
    """
    check_type("chain", chain, Chain, "use Chain(denoiser, table, event_shape)")
    check_type("noise", noise, Noise, "use Noise(0), for example")
    starts, repeats = check_integer("starts", starts), check_integer("repeats", repeats)
    chunk = None if chunk is None else check_integer("chunk", chunk)
    size, score = _starts_at_once(chain, repeats, chunk), as_reward(reward)
    away = processes.world_size() > 1  # from the device, on the way to other processes

    def part(index: int) -> Evaluation:
        with GlobalGenerators(noise, index, device=chain.device):
            made = _part(chain, score, noise, index, min(size, starts - index * size), repeats, first=index == first)
        return moved(made, "cpu") if away else made

    in_step = is_sharded(chain.denoiser) or is_sharded(chain.reference)
    parts = processes.in_turns(part, range(first, -(-starts // size)), in_step=in_step)
    return (moved(each, chain.device) for each in parts)


def conditions_of(
    chain: Chain, noise: Noise, *, starts: int, repeats: int, chunk: int | None = None
) -> dict[str, Tensor] | None:
    """What the starts of an evaluation were sampled under, tensors with leading dimension `starts`; None without a
    condition. Arguments as in `evaluate`.
    """
    size = _starts_at_once(chain, repeats, chunk)
    counts = [min(size, starts - first) for first in range(0, starts, size)]
    parts = [chain.conditions(noise, count, [index]) for index, count in enumerate(counts)]
    given = [part for part in parts if part is not None]
    return {name: torch.cat([part[name][0] for part in given]) for name in given[0]} if given else None


def _starts_at_once(chain: Chain, repeats: int, chunk: int | None) -> int:
    """The number of starts in one network batch."""
    return max(1, (at_once(chain.event_shape) if chunk is None else chunk) // repeats)


def at_once(event_shape: Sequence[int]) -> int:
    """The number of samples of this shape in one network call, where nobody asks for another."""
    return max(1, min(256, NUMBERS // math.prod(event_shape)))


def moved(evaluation: Evaluation, device: torch.device | str) -> Evaluation:
    """The same numbers on a device."""
    return mapped(lambda values: values.to(device), evaluation)


def mapped(function: Callable[..., Tensor], *evaluations: Evaluation) -> Evaluation:
    """The evaluation whose columns are a function of the columns of these, all of which hold the same rewards."""
    columns: Any = zip(*(vars(each).values() for each in evaluations), strict=True)
    made: Any = (None if values[0] is None else function(*values) for values in columns)
    return Evaluation(*made)


def weighed(evaluation: Evaluation, reward: Callable[..., Any] | Reward) -> Evaluation:
    """The evaluation with R by the coefficients of `reward`; those that it was made, and stored, with may be others."""
    check_type("evaluation", evaluation, Evaluation, "pass what evaluate(chain, reward, noise, ...) returns")
    if evaluation.rewards is None or not isinstance(reward, WeightedRewards):
        return evaluation
    return replace(evaluation, reward=reward.total(evaluation.rewards))


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the given parts, in their order."""
    return mapped(lambda *values: torch.cat(values), *parts)


class Travelled(NamedTuple):
    """The end of trajectories, and what they tell of their path: `path_kl` and `log_ratio` as in `Evaluation`."""

    x: Float[Tensor, "batch *event"]
    path_kl: Float[Tensor, " batch"]
    log_ratio: Float[Tensor, " batch"]


@torch.no_grad()
def travelled(chain: Chain, x: Float[Tensor, "batch *event"], noise: Noise, index: int, *, repeats: int) -> Travelled:
    """Trajectory `index` from x_0 = `x`, of which `repeats` consecutive states share a condition."""
    compare = chain.denoiser is not chain.reference
    singular = compare and bool(chain.table.noiseless(among=chain.trained_rows))
    kl = log_ratio = x.new_zeros(len(x))
    for row, (transition, xi, state) in enumerate(
        chain.walk(x, noise, index, reference=compare and not singular, repeats=repeats)
    ):
        x = state[0]
        if transition.u0 is not None and xi is not None and row not in chain.pretrained_rows:
            step = squared_norm(transition.shift)[0] / 2
            kl = kl + step
            log_ratio = log_ratio + step + (transition.shift * xi).flatten(2).sum(-1)[0]
    return Travelled(x, kl + math.inf, log_ratio + math.nan) if singular else Travelled(x, kl, log_ratio)


@torch.no_grad()
def _part(
    chain: Chain, score: Reward, noise: Noise, index: int, starts: int, repeats: int, *, first: bool
) -> Evaluation:
    """Part `index`: its trajectories have that number as the key of their noise."""
    with chain.evaluating(), score.evaluating():
        begun = chain.initial(noise, starts, index).repeat_interleave(repeats, 0)
        x, kl, log_ratio = travelled(chain, begun, noise, index, repeats=repeats)
        end = chain.endpoint(x.clone(), noise, index, repeats=repeats)  # a black box may write into it
        with trying("reward", f"samples of shape {tuple(x.shape)}") if first else nullcontext():
            if not score.checked and index == 0:  # later parts were tried with the first; a try may draw random numbers
                score.probe(end)
            reward, rewards = score.scored(end)
        columns = (reward, kl, log_ratio, x, rewards)
        made: Any = (None if each is None else each.unflatten(0, (-1, repeats)) for each in columns)
        return Evaluation(*made)
