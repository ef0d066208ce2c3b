"""Callbacks that aim at a path KL: stop the run there, or adapt the weight β until the path KL stays there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.kept import Kept
from implicit_diffusion.runs.state import Fit
from implicit_diffusion.showing import Shown, with_error


def _kl_weight(fit: Fit, name: str, held_out: HeldOut | None = None) -> float:
    """The weight β of the path KL, which a callback needs, and which metrics or held-out noise must know."""
    weight = fit.loop.objective.weight(PathKL)
    if weight == 0:
        raise InvalidInputError(
            f"{name} needs a path KL to aim at, but the objective is {fit.loop.objective!r}; add beta * PathKL()"
        )
    if held_out is None and isinstance(fit.loop, ChainLoop) and PathKL.name in fit.loop.unreported:
        advice = ", or pass held_out" if name == "StopAtKL" else ""
        raise InvalidInputError(
            f"{name} needs the path KL of whole trajectories, but {fit.loop.estimator.name} does not pull "
            f"back all {fit.chain.num_steps} rows, so that no step reports it; use Adjoint(){advice}"
        )
    return weight


ATTEMPTS = 12  # points that are tried on a line


@dataclass(repr=False)
class StopAtKL(Shown):
    """Callback: stop when the path KL reaches a target.

    With `held_out`, the path KL is evaluated on held-out noise, early enough. After small steps it grows at most with
    the square of the number of updates: if it is K after n updates, it reaches the target κ after n·√(κ/K) at the
    earliest. Evaluations come after 1, 2, 4, … updates, then each half-way to that update, in the end after every
    update; after the last update of the run; and at once when the training's own path KL, scaled by its ratio to the
    held-out one at the last evaluation, has reached the target. The last model below the target is kept. In the end the
    model is moved from there towards the one above the target, until the path KL is κ, within twice its standard error
    or a fiftieth, however large the last steps were.

    Without `held_out`, the training's own path KL is averaged over the last updates: that lags behind and stops late,
    and the model is left as it is then.

    Args:
        target: path KL in nats.
        decay: weight of the average so far, when an update is added to it.
        average: of the training's path KL so far; None before the first update.
        held_out: evaluations on held-out noise, whether or not they are also a callback of the run.

    Raises:
        InvalidInputError: at the start, for an objective in which the path KL has no weight; without `held_out`, for an
            estimator that does not pull back all rows, so that the training's own path KL is unknown.
    """

    target: float
    decay: float = 0.9
    average: float | None = None
    held_out: HeldOut | None = None
    _due: int = field(default=1, init=False, repr=False)  # update of the next evaluation
    _scale: float = field(default=1.0, init=False, repr=False)  # of the held-out path KL over the training's
    _kept: Kept = field(default_factory=lambda: Kept("below"), init=False, repr=False)
    _reached: float = field(default=math.inf, init=False, repr=False)  # path KL at which it was stopped

    def __call__(self, fit: Fit) -> str | None:
        _kl_weight(fit, "StopAtKL", self.held_out)
        now = float(fit.metrics["path_kl"]) if "path_kl" in fit.metrics else None
        if self.held_out is not None:
            return self._in_time(fit, self.held_out, now)
        if now is None:
            return None
        self.average = now if self.average is None else self.decay * self.average + (1 - self.decay) * now
        reached = self.average >= self.target
        return f"path KL {self.average:.3g} nats reached the target {self.target:g}" if reached else None

    def begin(self, fit: Fit) -> None:
        """Keep the model that the run begins with, to have one below the target."""
        _kl_weight(fit, "StopAtKL", self.held_out)
        if self.held_out is not None and self._kept.numbers is None:
            self._keep(fit, *mean_and_error(self.held_out.evaluate(fit).path_kl))

    def _in_time(self, fit: Fit, held_out: HeldOut, now: float | None) -> str | None:
        last = fit.updates == fit.total
        if not last and fit.updates < self._due and not (now is not None and self._scale * now >= self.target):
            return None
        kl, error = mean_and_error(held_out.look(fit).path_kl)
        if not kl < self.target:
            self._reached = math.inf if math.isnan(kl) else kl
            return f"the path KL on held-out noise, {with_error(kl, error)} nats, reached the target {self.target:g}"
        self._keep(fit, kl, error)
        reach = fit.updates * math.sqrt(self.target / max(kl, 1e-30))
        self._due = fit.updates + max(1, int(min(fit.updates, (reach - fit.updates) / 2)))
        self._scale = kl / now if now else self._scale
        return None

    def _keep(self, fit: Fit, kl: float, error: float) -> None:
        if kl < self.target:
            self._kept.keep(fit, path_kl=kl, path_kl_se=error)

    def settle(self, fit: Fit) -> str:
        """Move the model to the target, between the last evaluation below it and the one above.

        The square root of the path KL is nearly linear on the line between the two, so that secants find the point;
        every third attempt halves the interval instead.
        """
        if self.held_out is None or self._kept.numbers is None:
            return ""
        place, root, seen = self._kept.line(fit), math.sqrt(self.target), self._kept.numbers
        low, high = (0.0, math.sqrt(seen["path_kl"])), (1.0, math.sqrt(self._reached))
        for attempt in range(ATTEMPTS):
            slope = (high[1] - low[1]) / (high[0] - low[0])
            halves = attempt % 3 == 2 or not math.isfinite(slope)
            share = (low[0] + high[0]) / 2 if halves else low[0] + (root - low[1]) / slope
            place(share)
            kl, error = mean_and_error(self.held_out.evaluate(fit).path_kl)
            if abs(kl - self.target) <= max(2 * error if math.isfinite(error) else 0.0, self.target / 50):
                break
            if kl < self.target:
                low = share, math.sqrt(kl)
            else:
                high = share, math.sqrt(kl) if kl < math.inf else math.inf
        fit.kept = {"updates": seen["updates"], "share": share, "path_kl": kl, "path_kl_se": error}
        between = f"between those of updates {seen['updates']} and {fit.updates}"
        return f"The model is put {between}, where the path KL is {with_error(kl, error)} nats"

    def state_dict(self) -> dict[str, Any]:
        """The average so far, and when to evaluate again."""
        return {"average": self.average, "due": self._due, "scale": self._scale, "kept": self._kept.numbers} | {
            "reached": self._reached
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""
        self.average = state["average"]
        self._due, self._scale = state.get("due", self._due), state.get("scale", self._scale)
        self._kept.numbers, self._reached = state.get("kept"), state.get("reached", math.inf)


@dataclass
class AdaptKL:
    """Callback: adapt the weight β of the path KL until the KL stays at a target, β ← β exp(rate · (KL/target − 1)).

    The excess is clipped to ±1, so that β takes at least 1/(1.4 rate) updates to double; adaptation has to be slow
    compared with the staleness of the queue.

    Args:
        target: path KL in nats.
        rate: per update.

    Raises:
        InvalidInputError: at the start, for an objective in which the path KL has no weight, or an estimator that does
            not pull back all rows, so that the path KL is unknown.
    """

    target: float
    rate: float = 0.02

    def begin(self, fit: Fit) -> None:
        """Raise `InvalidInputError` before the first step where there is no path KL to aim at."""
        _kl_weight(fit, "AdaptKL")

    def __call__(self, fit: Fit) -> None:
        beta = _kl_weight(fit, "AdaptKL")
        if "path_kl" not in fit.metrics:
            return
        excess = max(-1.0, min(1.0, float(fit.metrics["path_kl"]) / self.target - 1))
        fit.loop.objective = fit.loop.objective.with_weight(PathKL, beta * math.exp(self.rate * excess))
        fit.metrics["kl_weight"] = beta
