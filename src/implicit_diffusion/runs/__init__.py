"""A run on disk: what it leaves behind, what it shows, how it stops and continues; and what watches over it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.files.states import load_state, save_state
    from implicit_diffusion.runs.callbacks.adapt import AdaptStep
    from implicit_diffusion.runs.callbacks.held_out import HeldOut
    from implicit_diffusion.runs.callbacks.rise import Rise
    from implicit_diffusion.runs.callbacks.targets import AdaptKL, StopAtKL
    from implicit_diffusion.runs.callbacks.watch import Runaway, Watch
    from implicit_diffusion.runs.console import Progress, progress
    from implicit_diffusion.runs.directory import RunDirectory
    from implicit_diffusion.runs.signals import Stop, graceful
    from implicit_diffusion.runs.state import Fit
    from implicit_diffusion.runs.trackers.opening import tracked
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AdaptKL",
    "AdaptStep",
    "Fit",
    "HeldOut",
    "Progress",
    "Rise",
    "RunDirectory",
    "Runaway",
    "Stop",
    "StopAtKL",
    "Watch",
    "graceful",
    "load_state",
    "progress",
    "save_state",
    "tracked",
]
