"""Pictures of the model so far, for the trackers of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.state import Fit
from implicit_diffusion.runs.trackers.tracking import Pixels
from implicit_diffusion.showing import Shown

SHOWINGS = 10  # pictures in a run, besides the one before its first update


def due(updates: int, total: int) -> bool:
    """Whether a run of `total` updates is pictured after `updates` of them: at its beginning and end, and in between.

    The schedule depends on nothing else, so that a resumed run has the pictures of an uninterrupted one.
    """
    return updates % -(-total // SHOWINGS) == 0 or updates == total


@dataclass(repr=False)
class Pictures(Shown):
    """Callback: show a picture of the model so far to the trackers of the run.

    Args:
        draw: makes it, always from the same noise; it must leave the state of the run as it is.
        name: of the picture.
    """

    draw: Callable[[Fit], Pixels]
    name: str = "samples"

    def begin(self, fit: Fit) -> None:
        """Picture the model before its first update."""
        if fit.updates == 0:
            self._show(fit)

    def __call__(self, fit: Fit) -> None:
        if due(fit.updates, fit.total):
            self._show(fit)

    def _show(self, fit: Fit) -> None:
        if fit.directory is not None and fit.directory.tracking.wanted:
            with part("pictures"):
                fit.directory.tracking.picture(fit.updates, self.name, self.draw(fit))
