"""Reward functions as people write them: what they are called with, and one number per sample in what they return."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.reward_values.arguments import (
        given_as,
        like,
        of_tensors,
        takes_condition,
        wants_metadata,
        with_metadata,
    )
    from implicit_diffusion.reward_values.frames import of_frames
    from implicit_diffusion.reward_values.results import scores_of
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "given_as",
    "like",
    "of_frames",
    "of_tensors",
    "scores_of",
    "takes_condition",
    "wants_metadata",
    "with_metadata",
]
