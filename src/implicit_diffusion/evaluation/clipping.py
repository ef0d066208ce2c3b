"""What a scheduler's `clip_sample` does to the samples of a chain, which runs without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives.reward import Reward, as_reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

SAMPLES = 128


@dataclass(frozen=True, repr=False)
class ClippingEffect(Shown):
    """Changes that switching `clip_sample` off makes to samples of the same noise.

    Args:
        mean_absolute_change: of a number of a sample.
        largest_change: of a number of a sample.
        reward_with_clipping: mean reward of the scheduler's samples.
        reward_without_clipping: mean reward of the chain's samples.
    """

    mean_absolute_change: float
    largest_change: float
    reward_with_clipping: float
    reward_without_clipping: float


@torch.no_grad()
def effect_of_clipping(
    chain: Chain,
    clipped: Any,
    reward: Callable[..., Tensor] | Reward,
    noise: Noise,
    options: Mapping[str, Any],
) -> ClippingEffect:
    """Sample the chain, and its scheduler with clipping, from the same noise.

    Args:
        chain: without clipping.
        clipped: the diffusers scheduler with clipping.
        reward: R, (n, *event) → (n,).
        noise: for both; the scheduler gets the generators that the chain's ξ come from.
        options: further arguments of `clipped.step`.
    """
    score = as_reward(reward)
    x, condition = chain.initial(noise, SAMPLES), chain.conditions(noise, SAMPLES, [0])
    clipped.set_timesteps(chain.num_steps)
    with chain.evaluating():
        for row, t in enumerate(clipped.timesteps):
            u = chain.transition(x[None], [row], condition=condition).u[0]
            generator = noise.generator(0, row + 1, device=x.device)
            x = clipped.step(u, t, x, generator=generator, **options).prev_sample
    free = chain.sample(noise, SAMPLES)
    return ClippingEffect(
        mean_absolute_change=(free - x).abs().mean().item(),
        largest_change=(free - x).abs().max().item(),
        reward_with_clipping=score.of(chain.endpoint(x, noise)).mean().item(),
        reward_without_clipping=score.of(chain.endpoint(free, noise)).mean().item(),
    )
