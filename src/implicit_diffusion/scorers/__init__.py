"""Rewards in a process of their own, computed by the python of another environment."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.scorers.process import versions
    from implicit_diffusion.scorers.scorer import TIMEOUT, Scorer, closing
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["TIMEOUT", "Scorer", "closing", "versions"]
