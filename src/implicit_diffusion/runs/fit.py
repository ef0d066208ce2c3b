"""The driver of a loop: metrics to disk, checkpoints, callbacks, a clean stop.

A loop's `step()` knows nothing of files or terminals; `fit` does. Callbacks are functions of the `Fit` so far and stop
the run by returning a reason:

    def early(fit):                     # stop when the held-out objective has not improved for a while
        return "no progress" if ... else None

They may look at everything, sample from `fit.loop.chain`, and replace `fit.loop.objective`. What a callback remembers
from one call to the next is part of the run: it is saved and restored where the callback has `state_dict()` and
`load_state_dict(state)`. So is the reason that stopped a run: as long as the callback that gave it is among those of
the resumed run, that does not train on. One that has `unsound(fit)` is asked before a checkpoint is written: a reason
that it returns keeps the previous one in its place.

What a reward draws from the global generators of torch, NumPy or Python follows from the loop's noise, and goes on with
the run; the caller's own generators are as they were when `fit` returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any

from implicit_diffusion.errors import DivergenceError, InvalidInputError, NonFiniteError, RewardError, check_path
from implicit_diffusion.loops import evaluate
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.loops.evaluation import mean_and_error
from implicit_diffusion.loops.on_chain import TRIAL
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.objectives.reward import TRIED, as_reward
from implicit_diffusion.runs.console import progress
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.generators import Draws
from implicit_diffusion.runs.signals import graceful
from implicit_diffusion.runs.state import Callback as Callback
from implicit_diffusion.runs.state import Fit as Fit
from implicit_diffusion.runs.state import checkpoint, restore, unsound, verdict
from implicit_diffusion.showing import Shown

SHOWN = ("reward", "path_kl", "objective", "grad_norm")
READ_EVERY = 1.0  # seconds between two looks at the metrics, which wait for the device


def fit(
    loop: Loop,
    updates: int,
    *,
    callbacks: Iterable[Callback] = (),
    directory: RunDirectory | str | PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    description: str = "fine-tuning",
) -> Fit:
    """Drive a loop until `updates` updates have been made in all, or a callback or a signal stops it.

    Args:
        loop: fresh or restored; with a directory that holds a checkpoint, it is restored from there, unless it is
            further already.
        updates: ≥ 1.
        callbacks: called in order after every update; the first that returns a reason stops the run.
        directory: of the run, or its path; gets metrics.jsonl, a few lines at a time, and the checkpoint, a last one
            when the run ends, and is held meanwhile; None leaves no trace.
        checkpoint_every: seconds between checkpoints.
        description: shown with the progress.

    Raises:
        InvalidInputError: updates below one; a directory that another run holds.
        NonFiniteError: NaN or infinity, before θ was touched or in what would be saved.
        DivergenceError: from a callback, or a run that ends in a state which one calls unsound.
        RewardError: a reward of the user's own raised.
        StorageError: metrics or a checkpoint could not be written.

    After all of these the last good state is in directory.checkpoint.
    """
    if updates < 1:
        raise InvalidInputError(f"updates must be an integer ≥ 1, got {updates}")
    if directory is not None and not isinstance(directory, RunDirectory):
        directory = RunDirectory(check_path("directory", directory))
    state = Fit(loop)
    with nullcontext() if directory is None else directory.held():
        _drive(state, updates, list(callbacks), directory, checkpoint_every, description)
    return state


def _drive(
    state: Fit,
    updates: int,
    callbacks: list[Callback],
    directory: RunDirectory | None,
    checkpoint_every: float,
    description: str,
) -> None:
    if directory is not None:
        if directory.has_state:
            restore(state, directory, callbacks)
        checkpoint(state, directory, callbacks)
    lines: list[dict[str, Any]] = []

    def write() -> None:
        waiting, lines[:] = list(lines), []
        if directory is not None:
            directory.append_metrics(*waiting)
            state.lines += len(waiting)

    saved_at: int = state.updates  # of the last checkpoint
    waits: int | None = None  # that of one of which the next update will tell whether it is sound
    last_saved = last_read = start = time.monotonic()
    with graceful() as stop, progress(updates, description) as bar:
        bar.update(advance=state.updates)
        try:
            for metrics in () if state.stopped else _steps(state, updates):
                state.seconds += time.monotonic() - start
                if "grad_norm" in metrics:
                    state.metrics = metrics | {"seconds": state.seconds}
                    with state.draws:
                        state.verdict = verdict(state, callbacks)
                    state.stopped = state.verdict and state.verdict[1]
                    bar.update({name: metrics[name] for name in SHOWN if name in metrics})
                    lines.append(state.metrics)
                    if waits is not None and directory is not None:  # it is known now what that state led to
                        if unsound(state, callbacks) is None:
                            directory.confirm()
                            saved_at = waits
                        waits = None
                if stop.requested:
                    state.stopped = "interrupted"
                if state.stopped:
                    break
                save = directory is not None and time.monotonic() - last_saved > checkpoint_every
                if save or time.monotonic() - last_read > READ_EVERY:
                    write()
                    last_read = time.monotonic()
                if save and directory is not None:
                    last_saved = time.monotonic()
                    if unsound(state, callbacks) is None:
                        checkpoint(state, directory, callbacks, known=False)
                        waits = state.updates
                start = time.monotonic()
            if stop.requested:  # in the last step, or while it was saved
                state.stopped = state.stopped or "interrupted"
            write()
            found = unsound(state, callbacks)
            if found is not None and state.stopped != "interrupted":
                raise DivergenceError(f"after update {state.updates}: {found}")
            if found is None and directory is not None:
                checkpoint(state, directory, callbacks)
        except (NonFiniteError, DivergenceError) as error:
            kept = f"; the last good state is in {directory.checkpoint}, of update {saved_at}" if directory else ""
            raise type(error)(f"{error}{kept}") from error
        except RewardError as error:
            raise RewardError(f"after update {state.updates}: {error}") from error
        finally:
            write()


def _steps(state: Fit, updates: int) -> Iterator[dict[str, Any]]:
    """The steps of the loop, with the generators of the run in place during each."""
    steps = state.loop.run(updates)
    while True:
        with state.draws:
            metrics = next(steps, None)
        if metrics is None:
            return
        yield metrics


def _kl_weight(fit: Fit, name: str) -> float:
    """β of the path KL, which a callback aims at."""
    weight = fit.loop.objective.weight(PathKL)
    if weight == 0:
        raise InvalidInputError(
            f"{name} needs a path KL to aim at, but the objective is {fit.loop.objective!r}; add beta * PathKL()"
        )
    return weight


@dataclass(repr=False)
class HeldOut(Shown):
    """Callback: reward and path KL of `fit.chain` on noise that training never sees, into the metrics.

    Args:
        reward: R, (n, *event) → (n,); under a condition, and in other forms, as in `Reward`.
        noise: of the evaluation, the same at every call.
        every: updates between two evaluations.
        starts: trajectories of each.
    """

    reward: Callable[..., Any] | Reward
    noise: Noise
    every: int = 25
    starts: int = 128

    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.every:
            return
        before, score = fit.chain.evaluations, as_reward(self.reward)
        if not score.probed:  # once, and on draws of its own: a resumed run does it again
            with Draws(self.noise, TRIAL, device=fit.chain.device):
                score.probe(fit.chain.endpoint(fit.chain.sample(self.noise, TRIED, TRIAL), self.noise, TRIAL))
            self.reward = score
        result = evaluate(fit.chain, score, self.noise, starts=self.starts)
        fit.chain.evaluations = before  # what is reported as cost is the training's own
        for name, values in (
            ("reward", result.reward),
            ("path_kl", result.path_kl),
            ("objective", result.objective(fit.loop.objective.weight(PathKL))),
        ):
            mean, error = mean_and_error(values)
            told = {f"held_out_{name}": mean, f"held_out_{name}_se": error}  # NaN: a single start has no spread
            fit.metrics |= {key: value for key, value in told.items() if math.isfinite(value)}


@dataclass
class StopAtKL:
    """Callback: stop as soon as the path KL, averaged over the last updates, reaches a target.

    Args:
        target: path KL in nats.
        memory: share of the average that each new update leaves standing.

    Raises:
        InvalidInputError: when called, an objective that gives the path KL no weight.
    """

    target: float
    memory: float = 0.9
    average: float | None = None

    def __call__(self, fit: Fit) -> str | None:
        _kl_weight(fit, "StopAtKL")
        if "path_kl" not in fit.metrics:
            return None
        now = float(fit.metrics["path_kl"])
        self.average = now if self.average is None else self.memory * self.average + (1 - self.memory) * now
        reached = self.average >= self.target
        return f"path KL {self.average:.3g} nats reached the target {self.target:g}" if reached else None

    def state_dict(self) -> dict[str, float | None]:
        """The average so far."""
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on from it."""
        self.average = state["average"]


@dataclass
class AdaptKL:
    """Callback: move the weight β of the path KL until the KL sits at a target, β ← β exp(rate · (KL/target − 1)).

    The excess is clipped to ±1, so that β at most doubles in 1/(1.4 rate) updates; the rate has to be slow beside
    the queue's staleness.

    Args:
        target: path KL in nats.
        rate: per update.

    Raises:
        InvalidInputError: when called, an objective that gives the path KL no weight.
    """

    target: float
    rate: float = 0.02

    def __call__(self, fit: Fit) -> None:
        beta = _kl_weight(fit, "AdaptKL")
        if "path_kl" not in fit.metrics:
            return
        excess = max(-1.0, min(1.0, float(fit.metrics["path_kl"]) / self.target - 1))
        fit.loop.objective = fit.loop.objective.with_weight(PathKL, beta * math.exp(self.rate * excess))
        fit.metrics["kl_weight"] = beta
