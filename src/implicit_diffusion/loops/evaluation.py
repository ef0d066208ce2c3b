"""What a chain is worth: reward and path KL on noise that training never sees.

Along a trajectory of u_θ, with Δ_k = b_k (u_θ − u_0)(m_k x_k, t_k), the log-likelihood ratio to the pretrained path is

    log dP_θ/dP_0 = Σ_k ‖Δ_k‖²/(2 s_k²) + ⟨Δ_k, ξ_k⟩/s_k

The first sum has the path KL as its mean, the second has mean zero. So R − β log dP_θ/dP_0 has the same mean as
R − β·(path KL), and under the best u_θ of all it does not vary at all given x_0: the estimate of J is the sharper the
better the training. The same numbers, as importance weights, give the bound J* (`implicit_diffusion.loops.bound`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import check_call, check_integer, check_number, check_tensor, check_type, trying
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives.path import squared_norm
from implicit_diffusion.objectives.reward import Reward, as_reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown, estimate, of_tensor

NUMBERS = 2**18  # in the states of one network call


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """Trajectories from `starts` initial noises, `repeats` from each.

    Args:
        reward: R(x_N).
        path_kl: Σ_k ‖Δ_k‖²/(2 s_k²) along each trajectory, in nats; infinite where a trained row has no noise.
        log_ratio: log dP_θ/dP_0 of each trajectory, in nats; NaN where a trained row has no noise.
        samples: x_N.
    """

    reward: Float[Tensor, "starts repeats"]
    path_kl: Float[Tensor, "starts repeats"]
    log_ratio: Float[Tensor, "starts repeats"]
    samples: Float[Tensor, "starts repeats *event"]

    def _words(self) -> Iterable[str]:
        starts, repeats = self.reward.shape
        yield f"{starts} starts × {repeats}"
        yield f"reward={estimate(self.reward)}"
        yield f"path_kl={estimate(self.path_kl)} nats"
        yield f"samples={of_tensor(self.samples[0, 0])}"

    def objective(self, beta: float) -> Float[Tensor, "starts repeats"]:
        """−R + β log dP_θ/dP_0 of every trajectory, whose mean is J = −E R + β·KL(path)."""
        return check_number("beta", beta) * self.log_ratio - self.reward


def mean_and_error(values: Float[Tensor, "starts *repeats"]) -> tuple[float, float]:
    """Mean and its standard error; trajectories from one start are not independent, so starts are the unit."""
    check_tensor("values", values, "starts ...")
    per_start = values.reshape(len(values), -1).mean(1).double()
    error = per_start.std() / len(per_start) ** 0.5 if len(per_start) > 1 else torch.tensor(float("nan"))
    return per_start.mean().item(), error.item()


@torch.no_grad()
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
    sharp. A start is an x_0 with its condition: all its repeats have the same prompt.

    Args:
        chain: the sampler; a chain whose denoiser is its own reference has log-ratio zero and pays one network call
            per step.
        reward: R, (n, *event) → (n,); under a condition, and in other forms, as in `Reward`. Whether each reward
            depends on its own sample alone is tried on a few samples first, unless it is a `Reward` that was.
        noise: of the evaluation; take `Noise(seed).stream(1)` to keep it apart from training.
        starts: independent x_0.
        repeats: trajectories from each x_0; the conditional bound needs several.
        chunk: trajectories in one network call, rounded down to whole starts; by default 256 small ones, and fewer
            the larger they are. Numbers depend on it through the noise.
        progress: called with the number of trajectories just done.

    Raises:
        InvalidInputError: starts, repeats or chunk below one; rewards that are not one number per sample, or
            depend on other samples than their own.
        NonFiniteError: rewards that are NaN or infinite.
    """
    check_type("chain", chain, Chain, "take Chain(denoiser, table, event_shape)")
    starts, repeats = check_integer("starts", starts), check_integer("repeats", repeats)
    chunk = None if chunk is None else check_integer("chunk", chunk)
    check_call("progress", progress, "done")
    parts: list[tuple[Tensor, ...]] = []
    if chunk is None:
        chunk = max(1, min(256, NUMBERS // torch.Size(chain.event_shape).numel()))
    size = max(1, chunk // repeats)
    compare = chain.denoiser is not chain.reference
    score = as_reward(reward)
    singular = compare and not set(chain.trained_rows).isdisjoint(chain.table.noiseless())
    with chain.evaluating(), score.evaluating():
        for index, first in enumerate(range(0, starts, size)):
            x = chain.initial(noise, min(size, starts - first), index).repeat_interleave(repeats, 0)
            kl = log_ratio = x.new_zeros(len(x))
            for row, (transition, xi, state) in enumerate(
                chain.walk(x, noise, index, reference=compare and not singular, repeats=repeats)
            ):
                x = state[0]
                if transition.u0 is not None and xi is not None and row not in chain.pretrained_rows:
                    shift = transition.b / transition.s * (transition.u - transition.u0)  # Δ_k / s_k
                    step = squared_norm(shift)[0] / 2
                    kl = kl + step
                    log_ratio = log_ratio + step + (shift * xi).flatten(2).sum(-1)[0]
            if singular:
                kl, log_ratio = kl + math.inf, log_ratio + math.nan
            end = chain.endpoint(x.clone(), noise, index, repeats=repeats)  # a black box may write into it
            with nullcontext() if parts else trying("reward", f"samples of shape {tuple(x.shape)}"):
                if not score.probed and not parts:
                    score.probe(end)
                judged = score.judge(end)
            rows = (judged, kl, log_ratio, x)
            parts.append(tuple(v.unflatten(0, (-1, repeats)) for v in rows))
            progress(len(x))
    return Evaluation(*(torch.cat(column) for column in zip(*parts)))
