"""F5: what a run leaves on disk and shows on screen, and how it is stopped and continued."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.runs.checkpoint import load_state, save_state
    from implicit_diffusion.runs.console import Progress, progress
    from implicit_diffusion.runs.directory import RunDirectory
    from implicit_diffusion.runs.held_out import HeldOut
    from implicit_diffusion.runs.rise import Rise
    from implicit_diffusion.runs.signals import Stop, graceful
    from implicit_diffusion.runs.targets import AdaptKL, StopAtKL
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "AdaptKL",
    "HeldOut",
    "Progress",
    "Rise",
    "RunDirectory",
    "Stop",
    "StopAtKL",
    "graceful",
    "load_state",
    "progress",
    "save_state",
]
