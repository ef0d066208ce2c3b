"""The driver of a loop: metrics to disk, checkpoints, callbacks, a clean stop.

A loop's `step()` knows nothing of files or terminals; `fit` does. Callbacks are functions of the `Fit` so far and stop
the run by returning a reason:

    def early(fit):                     # stop when the held-out objective has not improved for a while
        return "no progress" if ... else None

They may look at everything, sample from `fit.loop.chain`, and replace `fit.loop.objective`. What a callback remembers
from one call to the next is part of the run: it is saved and restored where the callback has `state_dict()` and
`load_state_dict(state)`. One that has `unsound(fit)` is asked before a checkpoint is written: a reason that it returns
keeps the previous one in its place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from implicit_diffusion.errors import DivergenceError, InvalidInputError, NonFiniteError, RewardError
from implicit_diffusion.loops import evaluate
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.loops.evaluation import mean_and_error
from implicit_diffusion.loops.on_chain import ChainLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.checkpoint import check_finite, load_state, save_state
from implicit_diffusion.runs.console import progress
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.signals import graceful
from implicit_diffusion.samplers.chain import Chain

SHOWN = ("reward", "path_kl", "objective", "grad_norm")
READ_EVERY = 1.0  # seconds between two looks at the metrics, which wait for the device


@dataclass
class Fit:
    """A run so far.

    Args:
        loop: the loop being driven.
        metrics: of the latest update; callbacks may add to them before they are written.
        seconds: spent in the loop's steps, callbacks and files left out.
        stopped: why the run ended before its updates were made, if it did.
    """

    loop: Loop
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str | None = None

    @property
    def updates(self) -> int:
        """Updates of θ so far."""
        return self.loop.update.updates

    @property
    def model(self) -> nn.Module:
        """The averaged model where there is an average, the present one elsewhere."""
        ema = self.loop.update.ema
        return self.loop.model if ema is None else ema.module

    @property
    def chain(self) -> Chain:
        """The denoising chain of that model; only loops over chains have one."""
        if not isinstance(self.loop, ChainLoop):
            raise InvalidInputError(f"a {type(self.loop).__name__} samples from a potential: it has no denoising chain")
        same = self.model is self.loop.model
        return self.loop.chain if same else self.loop.chain.replace(denoiser=self.model)


Callback = Callable[[Fit], str | None]


def fit(
    loop: Loop,
    updates: int,
    *,
    callbacks: Iterable[Callback] = (),
    directory: RunDirectory | None = None,
    checkpoint_every: float = 60.0,
    description: str = "fine-tuning",
) -> Fit:
    """Drive a loop until `updates` updates have been made in all, or a callback or a signal stops it.

    Args:
        loop: fresh or restored; with a directory that holds a checkpoint, it is restored from there, unless it is
            further already.
        updates: ≥ 1.
        callbacks: called in order after every update; the first that returns a reason stops the run.
        directory: gets metrics.jsonl, a few lines at a time, and the checkpoint, a last one when the run ends, and is
            held meanwhile; None leaves no trace.
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
    loop = state.loop
    if directory is not None:
        if directory.has_state:
            saved = load_state(directory.checkpoint)
            if saved["loop"]["iteration"] >= loop.iteration:
                loop.load_state_dict(saved["loop"])
                _restore(callbacks, saved.get("callbacks", []))
            state.seconds = saved["seconds"]
            directory.forget_metrics(state.updates)
            state.metrics = next(reversed(directory.read_metrics()), {})
        _checkpoint(state, directory, callbacks)
    lines: list[dict[str, Any]] = []

    def write() -> None:
        waiting, lines[:] = list(lines), []
        if directory is not None:
            directory.append_metrics(*waiting)

    saved_at: int = state.updates
    last_saved = last_read = start = time.monotonic()
    with graceful() as stop, progress(updates, description) as bar:
        bar.update(advance=state.updates)
        try:
            for metrics in loop.run(updates):
                state.seconds += time.monotonic() - start
                if "grad_norm" in metrics:
                    state.metrics = metrics | {"seconds": state.seconds}
                    state.stopped = next(filter(None, (callback(state) for callback in callbacks)), None)
                    bar.update({name: metrics[name] for name in SHOWN if name in metrics})
                    lines.append(state.metrics)
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
                    if _unsound(state, callbacks) is None:
                        _checkpoint(state, directory, callbacks)
                        saved_at = state.updates
                start = time.monotonic()
            if stop.requested:  # in the last step, or while it was saved
                state.stopped = state.stopped or "interrupted"
            write()
            found = _unsound(state, callbacks)
            if found is not None and state.stopped != "interrupted":
                raise DivergenceError(f"after update {state.updates}: {found}")
            if found is None and directory is not None:
                _checkpoint(state, directory, callbacks)
        except (NonFiniteError, DivergenceError) as error:
            kept = f"; the last good state is in {directory.checkpoint}, of update {saved_at}" if directory else ""
            raise type(error)(f"{error}{kept}") from error
        except RewardError as error:
            raise RewardError(f"after update {state.updates}: {error}") from error
        finally:
            write()


def _unsound(state: Fit, callbacks: list[Callback]) -> str | None:
    """The first reason that a callback gives against saving the state."""
    asked: list[Any] = [callback for callback in callbacks if hasattr(callback, "unsound")]
    return next(filter(None, (callback.unsound(state) for callback in asked)), None)


def _checkpoint(state: Fit, directory: RunDirectory, callbacks: list[Callback]) -> None:
    if not all(p.isfinite().all() for p in state.loop.update.parameters):
        raise NonFiniteError(f"after update {state.updates}: the parameters hold NaN or infinity")
    remembered = [[type(callback).__name__, callback.state_dict()] for callback in _stateful(callbacks)]
    told = {"loop": state.loop.state_dict(), "seconds": state.seconds, "callbacks": remembered}
    buffers = [name for name, _ in state.loop.model.named_buffers()]  # masks among them
    try:
        check_finite(told, ("log_weights", *buffers, *(f"module.{name}" for name in buffers)))
    except NonFiniteError as error:
        raise NonFiniteError(f"after update {state.updates}: {error}") from error
    save_state(directory.checkpoint, told)


def _restore(callbacks: list[Callback], remembered: list[list[Any]]) -> None:
    """Give every callback its state: the first one left of its class; one that was not there before begins anew."""
    left = list(remembered)
    for callback in _stateful(callbacks):
        names = [name for name, _ in left]
        if type(callback).__name__ in names:
            callback.load_state_dict(left.pop(names.index(type(callback).__name__))[1])


def _stateful(callbacks: list[Callback]) -> list[Any]:
    return [callback for callback in callbacks if hasattr(callback, "state_dict")]


def _kl_weight(fit: Fit, name: str) -> float:
    """β of the path KL, which a callback aims at."""
    weight = fit.loop.objective.weight(PathKL)
    if weight == 0:
        raise InvalidInputError(
            f"{name} needs a path KL to aim at, but the objective is {fit.loop.objective!r}; add beta * PathKL()"
        )
    return weight


@dataclass
class HeldOut:
    """Callback: reward and path KL of `fit.chain` on noise that training never sees, into the metrics.

    Args:
        reward: R, (n, *event) → (n,); under a condition as in `Reward`.
        noise: of the evaluation, the same at every call.
        every: updates between two evaluations.
        starts: trajectories of each.
    """

    reward: Callable[..., Tensor]
    noise: Noise
    every: int = 25
    starts: int = 128

    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.every:
            return
        before = fit.chain.evaluations
        result = evaluate(fit.chain, self.reward, self.noise, starts=self.starts)
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
