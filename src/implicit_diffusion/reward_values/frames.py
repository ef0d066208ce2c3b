"""Rewards of images as rewards of videos: the mean over all frames."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from implicit_diffusion.reward_values.arguments import like, signature_of
from implicit_diffusion.reward_values.results import scores_of


def of_frames(reward: Callable[..., Any]) -> Callable[..., Any]:
    """The same reward of images (n, C, H, W), which takes videos (n, C, frames, H, W) as well.

    It is called with all frames of a video as images, under the prompt or label of the video, and the mean over them is
    the reward. What it returns for images is returned as it is.
    """

    @functools.wraps(reward, updated=())  # a network's attributes stay its own
    def calling(x: Tensor, *condition: Any) -> Any:
        if x.ndim != 5:
            return reward(x, *condition)
        count = x.shape[2]
        frames = x.transpose(1, 2).flatten(0, 1)
        scores = scores_of(reward(frames, *(_repeated(each, count) for each in condition)), frames)
        return scores.unflatten(0, (len(x), count)).mean(1)

    with suppress(TypeError, ValueError):  # built-in functions may have no signature
        calling.__dict__["__signature__"] = signature_of(reward)
    return like(calling, reward)


def _repeated(values: Any, count: int) -> Any:
    """A condition of every video as one of each of its frames."""
    if isinstance(values, Tensor):
        return values.repeat_interleave(count, 0)
    return [value for value in values for _ in range(count)]
