"""Training that diverges though its numbers are finite: noticed before it replaces a sound state on disk.

`Runaway` is for loops over chains, `Watch` for loops over particles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import DivergenceError, InvalidInputError, check_type
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.loops.diagnostics import acceptance_advice
from implicit_diffusion.loops.diagnostics.divergence import MOST_DATA, WORDS, distance, diverged
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.console import Say, say_on_stderr
from implicit_diffusion.runs.fit import Fit
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

RISE = 1e4  # deviations of the pretrained reward
STUCK = 0.01  # acceptance below which particles stand still


def most_sound(chain: Chain) -> float:
    """The path KL in nats beyond which nothing of the pretrained law is left.

    A path KL of N·d/2 moves each of the d numbers of an event by one standard deviation of the step's own noise, in
    each of N steps. The limit is twenty times that, plus a thousand nats for the smallest chains.
    """
    return 1000.0 + 10 * chain.num_steps * torch.Size(chain.event_shape).numel()


@dataclass(repr=False)
class Runaway(Shown):
    """Callback: stop a run over a chain when its path KL, or the rest of J, diverges though it is finite.

    The path KL must not exceed that of the chain which training begins with by more than `most_sound`. The rest of J
    must not rise above its first value by 10⁴ standard deviations of the pretrained reward.

    Args:
        reward_std: standard deviation of the reward of the pretrained chain.
        every: number of updates between two checks; states to be saved are checked in any case.
        patience: number of bad checks in a row that stop the run.
        held_out: knows the chain that training begins with, where that is not the pretrained one.

    Raises:
        DivergenceError: when called; the message says what to change.
        InvalidInputError: at the start, for an objective with running costs under an estimator that does not pull back
            all rows: neither the path KL nor J is known then.
    """

    reward_std: float
    every: int = 10
    patience: int = 2
    held_out: HeldOut | None = None
    began: float | None = field(default=None, init=False)
    bad: int = field(default=0, init=False)
    seen: dict[str, Any] = field(default_factory=dict, init=False)

    def begin(self, fit: Fit) -> None:
        """Raise `InvalidInputError` before the first step where there are no numbers to check."""
        if isinstance(fit.loop, ChainLoop) and (costs := fit.loop.unreported):
            raise InvalidInputError(
                f"Runaway needs {', '.join(costs)} of whole trajectories, but the estimator {fit.loop.estimator.name} "
                f"does not pull back all {fit.chain.num_steps} rows, so that no step reports it; use Adjoint(), or "
                "watch held-out noise by Rise"
            )

    def __call__(self, fit: Fit) -> None:
        new = self._see(fit)
        if self.began is None and "rest" in self.seen:
            self.began = float(self.seen["rest"])
        if new and fit.updates % self.every == 0:  # a queue that drains has no new numbers to check
            reason = self.unsound(fit)
            self.bad = self.bad + 1 if reason else 0
            if reason and self.bad >= self.patience:
                raise DivergenceError(f"after update {fit.updates}: {reason}")

    def unsound(self, fit: Fit) -> str | None:
        """What has diverged, by the last numbers that there were; None where nothing has."""
        self._see(fit)
        chain, advice = fit.chain, "use a smaller `lr`, or a smaller `max_grad_norm`"
        most = most_sound(chain)
        if self.held_out is not None:
            most += mean_and_error(self.held_out.begun(fit).path_kl).mean
        kl = float(self.seen.get("path_kl", 0.0))
        if kl > most:
            return f"the path KL is {kl:.3g} nats: beyond {most:.3g} nothing of the pretrained model is left; {advice}"
        rest = float(self.seen["rest"]) if "rest" in self.seen else None
        if rest is not None and self.began is not None and rest > self.began + RISE * self.reward_std:
            return f"J without its path KL rose from {self.began:.3g} to {rest:.3g}, it diverges; {advice}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where J began, how many bad checks in a row there were, and the last numbers."""
        seen = {name: float(value) for name, value in self.seen.items()}
        return {"began": self.began, "bad": self.bad, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""
        self.began, self.bad, self.seen = state["began"], state["bad"], state.get("seen", {})

    def _see(self, fit: Fit) -> bool:
        """Whether the metrics have the numbers to watch; these are kept unread: reading would wait for the device."""
        m = fit.metrics
        new = {"path_kl": m["path_kl"]} if "path_kl" in m else {}
        if not new and "path_kl" in self.seen and "held_out_path_kl" in m:  # all that there is while a queue drains
            new = {"path_kl": m["held_out_path_kl"]}
        if "objective" in m:
            new["rest"] = m["objective"] - fit.loop.objective.weight(PathKL) * m.get("path_kl", 0.0)
        self.seen |= new
        return bool(new)


@dataclass(repr=False)
class Watch(Shown):
    """Callback: stop a run over particles when it diverges, and report when its step size no longer fits.

    See `loops.diagnostics.divergence` for what divergence is. Particles that began far away, and come nearer from one
    check to the next, are accepted. An acceptance that falls too low is reported, once until it fits again; below one
    per cent, the run stops.

    Args:
        data: to compare with; by default those of the objective, if it is maximum likelihood alone.
        every: number of updates between two checks.
        patience: number of bad checks in a row that stop the run.
        save: called after every sound check; None where nothing is kept.
        words: what to call the things to change, with the keys of `divergence.WORDS`.
        say: gets a sentence on a bad check that does not stop the run, or on the step size; by default it is printed to
            stderr.

    Raises:
        DivergenceError: when called; the message says in plain words what to change.
        InvalidInputError: when called, for a loop without particles.
    """

    data: Tensor | None = None
    every: int = 20
    patience: int = 2
    save: Callable[[Fit], None] | None = None
    words: Mapping[str, str] = field(default_factory=lambda: WORDS, repr=False)
    say: Say = field(default=say_on_stderr, repr=False)
    bad: int = field(default=0, init=False)
    nats: float | None = field(default=None, init=False)  # from the law of V, at the last check
    at: int = field(default=0, init=False)  # update of the last check
    before: float | None = field(default=None, init=False)  # nats at the check before that
    stiff: int = field(default=0, init=False)  # checks in a row at which the step size was too large

    def __post_init__(self) -> None:
        self.data = None if self.data is None else self.data[:MOST_DATA]

    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.every == 0:
            self.look(fit, self.patience)
            self._notice(fit)

    def look(self, fit: Fit, patience: int = 1) -> None:
        """Check now; by default a single bad check stops, as at the end of training, whose result would be used."""
        nats = distance(_particles(fit))
        reason = self._divergence(fit, nats)
        if fit.updates != self.at:
            self.at, self.before = fit.updates, self.nats
        self.nats = nats if nats > 0 else None
        self.bad = self.bad + 1 if reason else 0
        if reason and self.bad >= patience:
            raise DivergenceError(f"update {fit.updates}: {reason}")
        if reason:
            self.say(f"update {fit.updates}: {reason}. The run stops if this is still so at the next check")
        elif self.save is not None:
            self.save(fit)

    def unsound(self, fit: Fit) -> str | None:
        """What has gone wrong, if anything: such a state is not saved."""
        return self._divergence(fit, distance(_particles(fit)))

    def state_dict(self) -> dict[str, Any]:
        """How many bad checks in a row there were, and the results of the last one."""
        return {"bad": self.bad, "nats": self.nats, "at": self.at, "before": self.before, "stiff": self.stiff}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""
        self.bad, self.nats, self.at = state["bad"], state.get("nats"), state.get("at", 0)
        self.before, self.stiff = state.get("before"), state.get("stiff", 0)

    def _divergence(self, fit: Fit, nats: float) -> str | None:
        before = self.before if fit.updates == self.at else self.nats
        nearer = fit.updates <= self.every or (before is not None and nats < before)
        reason = diverged(_particles(fit), fit.metrics, data=self.data, nats=0.0 if nearer else nats, words=self.words)
        acceptance = fit.metrics.get("acceptance")
        if reason is None and acceptance is not None and float(acceptance) < STUCK:
            reason = (
                f"{float(acceptance):.1%} of the proposals are accepted: particles stand still, and Γ means nothing. "
                f"Use a smaller {self.words['step']} or {self.words['rate']}, or {self.words['tune']}"
            )
        return reason

    def _notice(self, fit: Fit) -> None:
        """Report that the acceptance was too low twice in a row, and that it fits again."""
        acceptance = fit.metrics.get("acceptance")
        misfit = None if acceptance is None else acceptance_advice(float(acceptance), self.words, low=True)
        if misfit and self.stiff == 1:
            self.say(f"update {fit.updates}: the step size no longer fits, {misfit}")
        elif not misfit and self.stiff > 1:
            self.say(f"update {fit.updates}: the step size fits again, {float(acceptance or 0):.0%} are accepted")
        self.stiff = self.stiff + 1 if misfit else 0


def _particles(fit: Fit) -> ParticleLoop:
    check_type("the loop that Watch looks at", fit.loop, ParticleLoop, "for loops over chains use Runaway")
    assert isinstance(fit.loop, ParticleLoop)
    return fit.loop
