"""Opening the trackers that a run asks for, before its work starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from implicit_diffusion import processes
from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.trackers.tensorboard import TensorBoard
from implicit_diffusion.runs.trackers.tracking import Tracker, Tracking
from implicit_diffusion.runs.trackers.wandb import WeightsAndBiases

TrackerName = Literal["tensorboard", "wandb"]
EVENTS = "tensorboard"  # folder of the event files, in that of the run


@contextmanager
def tracked(directory: RunDirectory, names: Collection[str]) -> Iterator[RunDirectory]:
    """The folder of a run whose lines and pictures go to trackers as well, for the block.

    Of several processes, the main one has the trackers; all draw the pictures, which some networks need.

    Args:
        directory: of the run; a tracker writes to it once there is something to show.
        names: of the trackers.

    Raises:
        MissingExtraError: the package of a tracker is not installed; the message has the command that installs it.
        InvalidInputError: no tracker has such a name; a tracker refuses.
    """
    own = dict.fromkeys(names) if processes.is_main() else ()
    trackers = processes.everywhere(lambda: [_open(name, directory) for name in own])
    tracking = Tracking(trackers, wanted=bool(names))
    try:
        yield RunDirectory(directory.path, tracking)
    except BaseException:
        with suppress(ImplicitDiffusionError):  # the first error is the one to report
            tracking.close()
        raise
    tracking.close()


def _open(name: str, directory: RunDirectory) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(directory.path / EVENTS)
    if name == "wandb":
        return WeightsAndBiases(directory.path)
    raise InvalidInputError(f"track must be among tensorboard and wandb, got {name!r}")
