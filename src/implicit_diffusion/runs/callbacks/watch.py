"""A training that runs away though its numbers are finite: seen before it replaces a sound one on disk.

`Runaway` is for loops over chains, `Watch` for loops over particles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import DivergenceError, check_type
from implicit_diffusion.loops.diagnostics import unfit
from implicit_diffusion.loops.divergence import DATA, WORDS, distance, diverged
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.console import Say, say_on_stderr
from implicit_diffusion.runs.fit import Fit
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

RISE = 1e4  # deviations of the pretrained reward
STUCK = 0.01  # acceptance below which nothing moves


def most_sound(chain: Chain) -> float:
    """The path KL in nats beyond which nothing of the pretrained law is left.

    One of N·d/2 moves each of the d numbers of an event by a deviation of the step's own noise, in each of N steps:
    twenty times that, and a thousand nats more, for the smallest chains.
    """
    return 1000.0 + 10 * chain.num_steps * torch.Size(chain.event_shape).numel()


@dataclass(repr=False)
class Runaway(Shown):
    """Callback: stop a run over a chain when its path KL, or the rest of J, runs away though it is finite.

    A path KL may not be beyond `most_sound`. What J holds beside it may not rise above where it began by 10⁴ deviations
    of the pretrained reward.

    Args:
        reward_std: of the pretrained chain.
        every: updates between two looks; states to be saved are looked at in any case.
        patience: bad looks in a row that stop.

    Raises:
        DivergenceError: when called, with what to change.
    """

    reward_std: float
    every: int = 10
    patience: int = 2
    began: float | None = field(default=None, init=False)
    bad: int = field(default=0, init=False)
    seen: dict[str, Any] = field(default_factory=dict, init=False)

    def __call__(self, fit: Fit) -> None:
        new = self._see(fit)
        if self.began is None and "rest" in self.seen:
            self.began = float(self.seen["rest"])
        if new and fit.updates % self.every == 0:  # a queue that drains tells nothing new: no second look at one batch
            found = self.unsound(fit)
            self.bad = self.bad + 1 if found else 0
            if found and self.bad >= self.patience:
                raise DivergenceError(f"after update {fit.updates}: {found}")

    def unsound(self, fit: Fit) -> str | None:
        """What has run away, if anything, by the last numbers that there were."""
        self._see(fit)
        chain, advice = fit.chain, "take a smaller --lr, or a smaller --max-grad-norm"
        most = most_sound(chain)
        kl = float(self.seen.get("path_kl", 0.0))
        if kl > most:
            return f"the path KL is {kl:.3g} nats: beyond {most:.3g} nothing of the pretrained model is left; {advice}"
        rest = float(self.seen["rest"]) if "rest" in self.seen else None
        if rest is not None and self.began is not None and rest > self.began + RISE * self.reward_std:
            return f"J without its path KL rose from {self.began:.3g} to {rest:.3g}, it runs away; {advice}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where it began, how many bad looks in a row there were, and the last numbers."""
        seen = {name: float(value) for name, value in self.seen.items()}
        return {"began": self.began, "bad": self.bad, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.began, self.bad, self.seen = state["began"], state["bad"], state.get("seen", {})

    def _see(self, fit: Fit) -> bool:
        """Whether the metrics have what is watched; it is kept, unread, since a device would be waited for."""
        m = fit.metrics
        new = {"path_kl": m["path_kl"]} if "path_kl" in m else {}
        if not new and "path_kl" in self.seen and "held_out_path_kl" in m:  # all that a queue tells while it drains
            new = {"path_kl": m["held_out_path_kl"]}
        if "objective" in m:
            new["rest"] = m["objective"] - fit.loop.objective.weight(PathKL) * m.get("path_kl", 0.0)
        self.seen |= new
        return bool(new)


@dataclass(repr=False)
class Watch(Shown):
    """Callback: stop a run over particles when it diverges, and say when its step size no longer fits.

    See `loops.divergence` for what divergence is. Particles that began far away, and come nearer from one look to the
    next, are let pass. An acceptance that falls too low is said, once until it fits again; below one per cent it stops
    the run.

    Args:
        data: to compare with; by default those of the objective where it is maximum likelihood alone.
        every: updates between two looks.
        patience: bad looks in a row that stop.
        save: called at every sound look; None where nothing is kept.
        words: what to call the things to change, with the keys of `divergence.WORDS`.
        say: gets a sentence on a bad look that does not stop, or on the step size; by default it is printed on stderr.

    Raises:
        DivergenceError: when called, in plain words with what to change.
        InvalidInputError: when called, a loop without particles.
    """

    data: Tensor | None = None
    every: int = 20
    patience: int = 2
    save: Callable[[Fit], None] | None = None
    words: Mapping[str, str] = field(default_factory=lambda: WORDS, repr=False)
    say: Say = field(default=say_on_stderr, repr=False)
    bad: int = field(default=0, init=False)
    nats: float | None = field(default=None, init=False)  # from the law of V, at the last look
    at: int = field(default=0, init=False)  # update of the last look
    before: float | None = field(default=None, init=False)  # nats at the look before that
    stiff: int = field(default=0, init=False)  # looks in a row at which the step size was too large

    def __post_init__(self) -> None:
        self.data = None if self.data is None else self.data[:DATA]

    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.every == 0:
            self.look(fit, self.patience)
            self._notice(fit)

    def look(self, fit: Fit, patience: int = 1) -> None:
        """Look now; by default a single bad look stops, as at the end of a training, whose result would be used."""
        nats = distance(_particles(fit))
        found = self._found(fit, nats)
        if fit.updates != self.at:
            self.at, self.before = fit.updates, self.nats
        self.nats = nats if nats > 0 else None
        self.bad = self.bad + 1 if found else 0
        if found and self.bad >= patience:
            raise DivergenceError(f"update {fit.updates}: {found}")
        if found:
            self.say(f"update {fit.updates}: {found}. The run stops if the next look says so too")
        elif self.save is not None:
            self.save(fit)

    def unsound(self, fit: Fit) -> str | None:
        """What has gone wrong, if anything: no such state is saved."""
        return self._found(fit, distance(_particles(fit)))

    def state_dict(self) -> dict[str, Any]:
        """How many bad looks in a row there were, and what the last one saw."""
        return {"bad": self.bad, "nats": self.nats, "at": self.at, "before": self.before, "stiff": self.stiff}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.bad, self.nats, self.at = state["bad"], state.get("nats"), state.get("at", 0)
        self.before, self.stiff = state.get("before"), state.get("stiff", 0)

    def _found(self, fit: Fit, nats: float) -> str | None:
        before = self.before if fit.updates == self.at else self.nats
        nearer = fit.updates <= self.every or (before is not None and nats < before)
        found = diverged(_particles(fit), fit.metrics, data=self.data, nats=0.0 if nearer else nats, words=self.words)
        acceptance = fit.metrics.get("acceptance")
        if found is None and acceptance is not None and float(acceptance) < STUCK:
            found = (
                f"{float(acceptance):.1%} of the proposals are accepted: particles stand still, and Γ means nothing. "
                f"Take a smaller {self.words['step']} or {self.words['rate']}, or {self.words['tune']}"
            )
        return found

    def _notice(self, fit: Fit) -> None:
        """Say it when the acceptance was too low twice in a row, and when it fits again."""
        acceptance = fit.metrics.get("acceptance")
        found = None if acceptance is None else unfit(float(acceptance), self.words, low=True)
        if found and self.stiff == 1:
            self.say(f"update {fit.updates}: the step size no longer fits, {found}")
        elif not found and self.stiff > 1:
            self.say(f"update {fit.updates}: the step size fits again, {float(acceptance or 0):.0%} are accepted")
        self.stiff = self.stiff + 1 if found else 0


def _particles(fit: Fit) -> ParticleLoop:
    check_type("the loop that Watch looks at", fit.loop, ParticleLoop, "over chains take Runaway")
    assert isinstance(fit.loop, ParticleLoop)
    return fit.loop
