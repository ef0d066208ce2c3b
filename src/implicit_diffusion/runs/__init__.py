"""A run on disk: what it leaves behind, what it shows, how it stops and continues."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.runs.console import Progress, progress
    from implicit_diffusion.runs.directory import RunDirectory
    from implicit_diffusion.runs.signals import Stop, graceful
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["Progress", "RunDirectory", "Stop", "graceful", "progress"]
