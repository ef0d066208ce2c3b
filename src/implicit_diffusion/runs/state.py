"""A run so far, and its state on disk: all that the next update depends on, and why the run stopped.

loop         θ, optimizer, noise keys, what is in flight
callbacks    what each remembers
verdict      the callback that stopped the run, and its reason: a run that has stopped does not train on
generators   the global ones, which rewards of the user's own may draw from
metrics      the last row, and the number of lines of metrics.jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.files.foreign import consistent, of_another
from implicit_diffusion.files.states import check_finite
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.processes import is_main, rank
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.metrics import restore_metrics
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

OTHERS = 2**31 + 2  # first key of the draws of rewards in all processes but the main one


@dataclass(repr=False)
class Fit(Shown):
    """A run so far.

    Args:
        loop: the loop being driven.
        metrics: of the latest update; callbacks may add to them before they are written.
        seconds: spent in the steps of the loop, without callbacks and files.
        stopped: why the run ended before all of its updates were made, if it did.
        verdict: name of the callback that stopped the run, and its reason; unlike an interrupt, saved with the run.
        lines: number of lines of metrics.jsonl so far.
        directory: of the run, if it has one.
        total: number of updates that the run is to make in all; 0 where that is not known.
        kept: where a callback put back an earlier model, its numbers, with `updates`.
        advice: what to change, from the callback that stopped the run; it is also in `stopped`.
        generators: the global generators that rewards of the user's own may draw from.
    """

    loop: Loop
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: str | None = None
    verdict: tuple[str, str] | None = None
    lines: int = 0
    directory: RunDirectory | None = None
    total: int = 0
    kept: dict[str, float] | None = None
    advice: str | None = None
    generators: GlobalGenerators = field(init=False)

    def __post_init__(self) -> None:
        noise = self.loop.noise if is_main() else self.loop.noise.stream(OTHERS, rank())  # of other samples
        device = next(self.loop.model.parameters()).device
        self.generators = GlobalGenerators(noise, self.loop.iteration, device=device)

    def _words(self) -> Iterable[str]:
        yield type(self.loop).__name__
        yield f"updates={self.updates}"
        yield f"seconds={self.seconds:.3g}"
        if self.stopped is not None:
            yield f"stopped={self.stopped!r}"

    @property
    def updates(self) -> int:
        """Number of updates of θ so far."""
        return self.loop.update.updates

    @property
    def model(self) -> nn.Module:
        """The moving average of the model if there is one, else the model itself."""
        ema = self.loop.update.ema
        return self.loop.model if ema is None else ema.module

    @property
    def chain(self) -> Chain:
        """The denoising chain of `model`; only loops over chains have one."""
        if not isinstance(self.loop, ChainLoop):
            raise InvalidInputError(
                f"a {type(self.loop).__name__} samples from a potential, and has no denoising chain; use fit.model"
            )
        averaged = self.model is not self.loop.model
        return self.loop.chain if not averaged else self.loop.chain.replace(denoiser=self.model)


Callback = Callable[[Fit], str | None]


def checkpoint(
    fit: Fit, directory: RunDirectory, callbacks: list[Callback], *, known: bool = True, keep: int = KEEP
) -> None:
    """Save all that the run continues from.

    Args:
        fit: the run so far.
        directory: of the run.
        callbacks: those of the run.
        known: whether it is known that the state is sound. The metrics of an update are taken before its step: only the
            next update says whether that step was sound. Until `directory.checkpoints.confirm` or `discard`, it waits.
        keep: number of states that stay, where this one is known to be sound.

    Raises:
        NonFiniteError: NaN or infinity in anything that would be saved; nothing is written.
        StorageError: it cannot be written; those before are unchanged.
    """
    if not all(p.isfinite().all() for p in fit.loop.update.parameters):
        raise NonFiniteError(f"after update {fit.updates}: the parameters hold NaN or infinity")
    fit.metrics = {k: v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for k, v in fit.metrics.items()}
    whole = {
        "loop": fit.loop.state_dict(),
        "seconds": fit.seconds,
        "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in _stateful(callbacks)],
        "verdict": fit.verdict,
        "metrics": fit.metrics,
        "lines": fit.lines,
        "generators": fit.generators.state_dict(),
    }
    buffers = [name for name, _ in fit.loop.model.named_buffers()]  # masks among them
    try:
        check_finite(whole, ("log_weights", *buffers, *(f"module.{name}" for name in buffers)))
    except NonFiniteError as error:
        raise NonFiniteError(f"after update {fit.updates}: {error}") from error
    if known:
        directory.checkpoints.save(fit.updates, whole, keep)
    else:
        directory.checkpoints.write(fit.updates, whole)


def unsound(fit: Fit, callbacks: list[Callback]) -> str | None:
    """The first reason of a callback not to keep the state; None where there is none."""
    asked: list[Any] = [callback for callback in callbacks if hasattr(callback, "unsound")]
    return next(filter(None, (callback.unsound(fit) for callback in asked)), None)


def restore(fit: Fit, directory: RunDirectory, callbacks: list[Callback]) -> None:
    """Continue from the newest sound checkpoint, unless the loop is further; a callback not saved begins anew.

    Raises:
        InvalidInputError: no checkpoint is as it was written, or the newest does not fit this loop.
    """
    number, saved = directory.read_checkpoint()
    with consistent(directory.checkpoints.path(number), of_another):
        _restore(fit, saved, directory, callbacks)


def _restore(fit: Fit, saved: dict[str, Any], directory: RunDirectory, callbacks: list[Callback]) -> None:
    behind = saved["loop"]["iteration"] < fit.loop.iteration
    fit.seconds = saved["seconds"]
    if not behind:
        fit.loop.load_state_dict(saved["loop"])
        _restore_callbacks(callbacks, saved.get("callbacks", []))
        if "generators" in saved:
            fit.generators.load_state_dict(saved["generators"])
        if saved.get("verdict") and saved["verdict"][0] in map(_name, callbacks):
            fit.verdict = saved["verdict"]
            fit.stopped = saved["verdict"][1]
    rows = restore_metrics(directory, saved["loop"]["update"]["updates"], saved.get("lines"))
    fit.lines = len(rows)
    fit.metrics = saved.get("metrics") or next(reversed(rows), {})


def _restore_callbacks(callbacks: list[Callback], saved: list[list[Any]]) -> None:
    """Give every callback its state, the first unused one of its class; one without a state begins anew."""
    left = list(saved)
    for callback in _stateful(callbacks):
        names = [name for name, _ in left]
        if type(callback).__name__ in names:
            callback.load_state_dict(left.pop(names.index(type(callback).__name__))[1])


def verdict(fit: Fit, callbacks: list[Callback]) -> tuple[str, str] | None:
    """Name and reason of the first callback that stops the run; None where none does."""
    for callback in callbacks:
        if reason := callback(fit):
            return _name(callback), reason
    return None


def begin(fit: Fit, callbacks: list[Callback]) -> None:
    """Call `begin` of the callbacks that have one, before the first step."""
    asked: list[Any] = [callback for callback in callbacks if hasattr(callback, "begin")]
    with fit.generators:
        for callback in asked:
            callback.begin(fit)


def settling(fit: Fit, callbacks: list[Callback]) -> Callable[[Fit], str] | None:
    """The `settle` of the callback that has stopped the run, if it has one."""
    asked: list[Any] = [c for c in callbacks if fit.verdict and hasattr(c, "settle") and _name(c) == fit.verdict[0]]
    return asked[0].settle if asked else None


def settle(fit: Fit, callbacks: list[Callback]) -> None:
    """Let the callback that has stopped the run put back what it kept, and add to its reason."""
    put_back = settling(fit, callbacks)
    if put_back is not None and fit.verdict is not None and fit.stopped != "interrupted":
        with fit.generators:
            added = put_back(fit)
        fit.stopped = f"{fit.verdict[1]}. {added}" if added else fit.verdict[1]


def _name(callback: Callback) -> str:
    """The name of a function, or of the class of a callback."""
    return getattr(callback, "__qualname__", type(callback).__name__)


def _stateful(callbacks: list[Callback]) -> list[Any]:
    return [callback for callback in callbacks if hasattr(callback, "state_dict")]
