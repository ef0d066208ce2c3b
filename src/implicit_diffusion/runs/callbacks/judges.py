"""Judges of a run: rewards that are never raised, watched for what the raised one costs.

A reward is a stand-in for what is wanted, and can be raised by what nobody wants. A judge that training never sees
tells: it falls while the reward rises. Both chains are scored on the same held-out noise, so that with the judge's
values v_i after some updates and v_i⁰ of the pretrained chain at the same start

    Δ = mean(v_i − v_i⁰),    se(Δ)² = Var(v_i − v_i⁰)/n

has a small error, the smaller the nearer the two chains. A fall is clear when it is neither chance nor a trifle:

    −Δ > max(4 se(Δ), 0.1 σ⁰)

where σ⁰ is the judge's standard deviation between pretrained samples. With 64 starts, a judge
that does not fall is reported by chance with a probability of 10⁻⁴ at each look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mean_and_error
from implicit_diffusion.evaluation.each_reward import deviation
from implicit_diffusion.objectives import WeightedRewards
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.kept import Kept
from implicit_diffusion.runs.console import Say, say_on_stderr
from implicit_diffusion.runs.state import Fit
from implicit_diffusion.showing import Shown, with_error

ERRORS = 4.0  # standard errors of a clear fall
TRIFLE = 0.1  # deviations between pretrained samples that a judge may fall without a word
COURSE = "course"  # folder of the samples in the directory of a run


def fell(change: Estimate, deviation: float) -> bool:
    """Whether a judge has fallen by more than chance and more than a trifle."""
    return -change.mean > max(ERRORS * change.error, TRIFLE * deviation)


def clearly_rose(change: Estimate) -> bool:
    """Whether a reward has risen by more than chance."""
    return change.mean > ERRORS * change.error


@dataclass(repr=False)
class Judges(Shown):
    """Callback: ask judges about the chain on held-out noise; report a clear fall, and keep the best model.

    They look when `held_out` does, and after the last update. The best model is that with the largest mean of the first
    judge among those looked at; `put_back_best` makes it the model of the run.

    Args:
        held_out: evaluations of a reward whose judges have the coefficient 0.
        pixels: makes an array of the samples that `held_out` keeps, to be stored at each look; None stores nothing.
        say: gets each warning; by default it is printed to stderr.

    Raises:
        InvalidInputError: the reward of `held_out` has no judge, or `held_out` has a single start.
    """

    held_out: HeldOut
    pixels: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    say: Say = field(default=say_on_stderr, repr=False)
    course: dict[str, list[list[float]]] = field(default_factory=dict, init=False)  # updates, change, its error
    warned: dict[str, int] = field(default_factory=dict, init=False)  # update of the first clear fall
    _kept: Kept = field(default_factory=lambda: Kept("judged"), init=False, repr=False)

    def __post_init__(self) -> None:
        reward = self.held_out.reward
        columns = dict(zip(reward.names, reward.coefficients)) if isinstance(reward, WeightedRewards) else {}
        self._columns = {name: j for j, (name, c) in enumerate(columns.items()) if not c}
        if not self._columns:
            raise InvalidInputError(
                "Judges needs held_out with WeightedRewards, in which a judge has the coefficient 0"
            )
        if self.held_out.starts < 2:
            raise InvalidInputError("Judges needs held_out with at least 2 starts: a single one has no standard error")
        self.course = {name: [] for name in self._columns}

    def best_update(self, name: str) -> int | None:
        """The update after which a judge was highest, the first of equal ones; None before the first look."""
        return int(max(self.course[name], key=lambda look: look[1])[0]) if self.course[name] else None

    def begin(self, fit: Fit) -> None:
        """Judge the pretrained chain before the first update, so that a judge that cannot be used fails then."""
        self.held_out.pretrained(fit)

    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.held_out.every and fit.updates != fit.total:
            return
        look, before = self.held_out.look(fit), self.held_out.pretrained(fit)
        rise = mean_and_error(look.reward.double() - before.reward.double())
        for place, (name, column) in enumerate(self._columns.items()):
            value, old = look.each_reward[column].double(), before.each_reward[column].double()
            change, std = mean_and_error(value - old), deviation(old)
            self.course[name].append([fit.updates, *change])
            if fell(change, std) and name not in self.warned:
                self.warned[name] = fit.updates
                self.say(f"update {fit.updates}: {_words(name, change, std, rise)}")
            if place == 0 and (self._kept.numbers is None or change.mean > self._kept.numbers["change"]):
                self._kept.keep(fit, change=change.mean, change_se=change.error)
        self._store(fit, look)

    def put_back_best(self, fit: Fit) -> None:
        """Put the best model in place of the present one.

        Raises:
            InvalidInputError: its file is gone or damaged.
        """
        self._kept.restore(fit)

    def state_dict(self) -> dict[str, Any]:
        """What was seen, reported and kept."""
        return {"course": self.course, "warned": self.warned, "kept": self._kept.numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""
        self.course = {name: list(state["course"].get(name, [])) for name in self._columns}
        self.warned, self._kept.numbers = dict(state["warned"]), state["kept"]

    def _store(self, fit: Fit, look: Evaluation) -> None:
        if self.pixels is not None and fit.directory is not None:
            fit.directory.save_part(f"{COURSE}/{fit.updates}", {"images": self.pixels(look.samples[:, 0])})


def _words(name: str, change: Estimate, std: float, rise: Estimate) -> str:
    """One line that says how far a judge has fallen, and what the reward did meanwhile."""
    fall = f"the judge {name} is {with_error(-change.mean, change.error)} below the pretrained model on held-out noise"
    fall += f", {-change.mean / std:.2g} of its deviations" if std > 0 else ""
    if clearly_rose(rise):
        return f"{fall}, while the reward is {with_error(*rise)} above: the reward may be hacked"
    return fall
