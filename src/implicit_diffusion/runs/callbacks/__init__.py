"""Callbacks of a run: they look at the loop between updates."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.runs.callbacks.held_out import HeldOut
    from implicit_diffusion.runs.callbacks.rise import Rise
    from implicit_diffusion.runs.callbacks.targets import AdaptKL, StopAtKL
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["AdaptKL", "HeldOut", "Rise", "StopAtKL"]
