"""The driver of a loop: metrics to disk, checkpoints, callbacks, a clean stop.

A loop's `step()` knows nothing of files or terminals; `fit` does. Callbacks are functions of the `Fit` so far, and stop
the run by returning a reason:

    def early(fit):                     # stop when the held-out objective has not improved for a while
        return "no progress" if ... else None

They may read everything, sample from `fit.chain`, and replace `fit.loop.objective`. Further methods of a callback:

    state_dict(), load_state_dict(state)   what it remembers from call to call is saved and restored with the run
    begin(fit)                             called before the first step
    unsound(fit)                           asked before a checkpoint is written; with a reason, the previous one is kept
    settle(fit)                            if it stopped the run: may replace the last model (`runs.callbacks.kept`),
                                           after the last checkpoint; what it returns is added to its reason

The reason that stopped a run is saved too: a resumed run that has the same callback does not train on.

What a reward draws from the global generators of torch, NumPy or Python is a function of the loop's noise, and its
state is saved with the run; when `fit` returns, the caller's own generators are as they were.

Several processes call `fit` alike, with a loop each, and make the same updates: a signal to one stops all of them, the
clock of the main one decides when something is written, and it alone writes and prints. Callbacks are called in all of
them with the same metrics, but for the seconds; whether to stop, by a clock too, the main one decides.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from os import PathLike
from typing import Any

from implicit_diffusion.errors import (
    DivergenceError,
    InvalidInputError,
    NonFiniteError,
    RewardError,
    StorageError,
    check_integer,
    check_path,
)
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.processes import from_main, main_alone
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.console import progress
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.signals import graceful
from implicit_diffusion.runs.state import Callback as Callback
from implicit_diffusion.runs.state import Fit as Fit
from implicit_diffusion.runs.state import begin, checkpoint, restore, settle, settling, unsound, verdict

IN_PROGRESS = ("reward", "path_kl", "objective", "grad_norm", "phase")
READ_EVERY = 1.0  # seconds between two readings of the metrics, each of which waits for the device


def fit(
    loop: Loop,
    updates: int,
    *,
    callbacks: Iterable[Callback] = (),
    directory: RunDirectory | str | PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    keep: int = KEEP,
    description: str = "fine-tuning",
) -> Fit:
    """Drive a loop until `updates` updates have been made in all, or a callback or a signal stops it.

    Args:
        loop: fresh or restored; with a directory that holds a checkpoint, it is restored from there, unless it is
            further already.
        updates: number of updates in all, ≥ 1.
        callbacks: called in order after every update; the first that returns a reason stops the run.
        directory: of the run, or its path. It is held meanwhile, and gets metrics.jsonl, a few lines at a time, and
            checkpoints, the last one when the run ends; None leaves no trace.
        checkpoint_every: seconds between checkpoints.
        keep: number of checkpoints that stay, ≥ 1: should the newest be damaged, an older one continues the run. The
            disk needs room for one more.
        description: shown with the progress.

    Raises:
        InvalidInputError: `updates` or `keep` below one; a directory that another run holds, or whose checkpoints are
            all damaged, or do not fit.
        NonFiniteError: NaN or infinity, before θ was touched or in what would be saved.
        DivergenceError: raised by a callback, or for a run that ends in a state that a callback calls unsound.
        RewardError: a reward of the user's own raised.
        StorageError: metrics or a checkpoint could not be written.
        ProcessError: another of several processes has ended.

    After each of these errors, the last good state is the newest in directory.checkpoint.
    """
    if updates < 1:
        raise InvalidInputError(f"updates must be an integer ≥ 1, got {updates}")
    check_integer("keep", keep)
    if directory is not None and not isinstance(directory, RunDirectory):
        directory = RunDirectory(check_path("directory", directory))
    result = Fit(loop, directory=directory, total=updates)
    with nullcontext() if directory is None else directory.held():
        _drive(result, updates, list(callbacks), directory, checkpoint_every, keep, description)
    return result


def _drive(
    fit: Fit,
    updates: int,
    callbacks: list[Callback],
    directory: RunDirectory | None,
    checkpoint_every: float,
    keep: int,
    description: str,
) -> None:
    if directory is not None:
        if directory.has_state:
            restore(fit, directory, callbacks)
        checkpoint(fit, directory, callbacks, keep=keep)
    if not fit.stopped:
        begin(fit, callbacks)
    lines: list[dict[str, Any]] = []

    def write() -> None:
        waiting, lines[:] = list(lines), []
        if directory is not None:
            directory.append_metrics(*waiting)
            fit.lines += len(waiting)

    waits: int | None = None  # update of a checkpoint that waits: the next update says whether it is sound
    last_saved = last_read = start = time.monotonic()
    with graceful() as stop, progress(updates, description, fit.updates) as bar, part("saving"):
        try:
            for metrics in () if fit.stopped else _steps(fit, updates):
                fit.seconds += time.monotonic() - start
                if "grad_norm" in metrics:
                    fit.metrics = metrics | {"seconds": fit.seconds}
                    with fit.generators:
                        fit.verdict = verdict(fit, callbacks)
                    bar.update(_shown(metrics), advance=fit.updates - bar.done)
                    lines.append(fit.metrics)
                    if waits is not None and directory is not None:  # it is known now what that state led to
                        if unsound(fit, callbacks) is None:
                            directory.checkpoints.confirm(waits, keep)
                        else:
                            directory.checkpoints.discard()
                        waits = None
                else:
                    bar.update(_shown(metrics), advance=0)
                save, read, stops = stop.agree(
                    directory is not None and time.monotonic() - last_saved > checkpoint_every,
                    time.monotonic() - last_read > READ_EVERY,
                    fit.verdict is not None,
                )
                fit.verdict = from_main(lambda: fit.verdict) if stops else None
                fit.stopped = fit.verdict and fit.verdict[1]
                if stop.requested:
                    fit.stopped = "interrupted"
                if fit.stopped:
                    break
                if save or read:
                    write()
                    last_read = time.monotonic()
                if save and directory is not None:
                    last_saved = time.monotonic()
                    if unsound(fit, callbacks) is None:
                        checkpoint(fit, directory, callbacks, known=False)
                        waits = fit.updates
                start = time.monotonic()
            stop.agree()
            if stop.requested:  # in the last step, or while it was saved
                fit.stopped = "interrupted"
            write()
            reason = unsound(fit, callbacks)
            ends = settling(fit, callbacks)  # in a state that its callback has judged already
            if reason is not None and not ends and fit.stopped != "interrupted":
                raise DivergenceError(f"after update {fit.updates}: {reason}")
            if (reason is None or ends) and directory is not None:
                checkpoint(fit, directory, callbacks, keep=keep)
            settle(fit, callbacks)
        except (NonFiniteError, DivergenceError, StorageError) as error:
            raise type(error)(f"{error}{directory.remains if directory else ''}") from error
        except RewardError as error:
            raise RewardError(f"after update {fit.updates}: {error}") from error
        finally:
            main_alone(write)  # whatever ended it, perhaps in this process alone
    stop.agree()
    if stop.requested:  # also while its model was put back
        fit.stopped = "interrupted"


def _shown(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in IN_PROGRESS if name in metrics}


def _steps(fit: Fit, updates: int) -> Iterator[dict[str, Any]]:
    """The steps of the loop, with the generators of the run in place during each."""
    steps = fit.loop.steps(updates)
    while True:
        with fit.generators, part("training"):
            metrics = next(steps, None)
        if metrics is None:
            return
        yield metrics
