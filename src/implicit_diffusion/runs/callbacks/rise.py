"""Training that makes J worse: reported while it runs, stopped if it stays so, ended with the best model so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import bound, most_kl
from implicit_diffusion.evaluation.chains import mapped, mean_and_error
from implicit_diffusion.evaluation.judging import CLEAR
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.kept import Kept
from implicit_diffusion.runs.callbacks.watch import RISE, most_sound
from implicit_diffusion.runs.console import Say, say_on_stderr
from implicit_diffusion.runs.state import Fit
from implicit_diffusion.showing import Shown, with_error

ERRORS = 4.0  # standard errors by which J must have risen, before the last update; `CLEAR` after it
FAR = 10.0  # times the path KL beyond which no sampler is as good as the pretrained one


def _times_smaller(factor: int) -> str:
    return f"a learning rate {factor} times smaller"


def smaller_rate(excess: float, possible: float) -> int:
    """The power of ten by which to divide a learning rate that left J above J* by `excess`, at first by `possible`.

    The part of J − J* that gradient noise causes is proportional to the learning rate: divided by excess/possible, the
    rate would bring J back to where it began, and divided by the next power of ten, below that.
    """
    if not (possible > 0 and math.isfinite(excess)):
        return 10
    return int(10 ** min(6, max(1, math.ceil(math.log10(excess / possible)))))


@dataclass(repr=False)
class Rise(Shown):
    """Callback: stop a run whose J on held-out noise stays above the pretrained chain's, and restore its best model.

    Where training begins with another chain than the pretrained one (`HeldOut.untrained`), J is compared with that of
    the chain that it begins with.

    Both chains are evaluated on the same noise, so that the rise of J is a paired difference with a small error.
    Evaluations come after 1, 2, 4, … updates, after every `held_out.every` updates, and after the last one. J counts as
    above where it has risen by four standard errors (two after the last update). The first time, this is reported; the
    run stops

    - when J was above at `patience` consecutive evaluations of those after every `held_out.every` updates. Those in
      between do not count: at the beginning, or with a high learning rate, J may pass a hump;
    - at once, when no hump is so high: when the path KL is ten times as large as the one beyond which no control is as
      good as the pretrained chain (`evaluation.bounds.most_kl`: J ≤ J_before allows no more). The training's own path
      KL costs nothing; when it is beyond that, the chain is evaluated, at most five times in `held_out.every` updates;
    - after the last update.

    Where β changes, J is that of the smallest β so far, and of the last β after the last update.

    Of the evaluations whose J is clearly below that of the pretrained chain, the one with the lowest J is kept. If the
    run is stopped, its model is put back; if there is none, the model is left as it is.

    Args:
        held_out: evaluations on held-out noise, whether or not they are also a callback of the run; ≥ 2 starts.
        pretrained: samples of the pretrained chain, such as those of a plan, which show what can be gained; by default
            the few of `held_out`.
        patience: number of evaluations.
        rate: describes a learning rate that is smaller by a given factor, as advice.
        say: gets each sentence while the run continues; by default it is printed to stderr.

    Raises:
        InvalidInputError: a single start; when called, for a chain whose path KL is infinite, since it has trained rows
            without noise.
    """

    held_out: HeldOut
    pretrained: Evaluation | None = field(default=None, repr=False)
    patience: int = 3
    rate: Callable[[int], str] = field(default=_times_smaller, repr=False)
    say: Say = field(default=say_on_stderr, repr=False)
    above: bool = field(default=False, init=False)
    _count: int = field(default=0, init=False, repr=False)  # consecutive evaluations above
    _looked: int = field(default=0, init=False, repr=False)  # update of the last evaluation
    _excess: float = field(default=math.nan, init=False, repr=False)  # of J over J*, when the run was stopped
    _lowest: float = field(default=math.inf, init=False, repr=False)  # β so far
    _kept: Kept = field(default_factory=lambda: Kept("better"), init=False, repr=False)
    _most: tuple[float, float] | None = field(default=None, init=False, repr=False, compare=False)  # β and path KL

    def __post_init__(self) -> None:
        if self.held_out.starts < 2:
            raise InvalidInputError("Rise needs held_out with at least 2 starts: a single one has no standard error")

    def __call__(self, fit: Fit) -> str | None:
        every = self.held_out.every
        last, regular = fit.updates == fit.total, fit.updates % every == 0
        early = fit.updates < every and fit.updates.bit_count() == 1
        self._beta(fit)
        if not (last or regular or early or self._is_far(fit)):
            return None
        self._looked = fit.updates
        look, before, now = self.held_out.look(fit), self.held_out.begun(fit), fit.loop.objective.weight(PathKL)
        beta = now if last else self._beta(fit)
        if beta and fit.chain.table.noiseless(among=fit.chain.trained_rows):
            raise InvalidInputError(
                "Rise compares J, but its path KL is infinite: a trained row of the chain has no noise; keep the "
                "pretrained network there, pretrained_rows='noiseless'"
            )
        rise, error = mean_and_error(_j(look, beta) - _j(before, beta))
        j, was = mean_and_error(_j(look, beta))[0], mean_and_error(_j(before, beta))[0]
        above = not rise <= (CLEAR if last else ERRORS) * error  # a J that is not finite any more has risen
        fall, fall_se = mean_and_error(_j(before, now) - _j(look, now))
        if fall > CLEAR * fall_se and mean_and_error(_j(look, now))[0] < self._kept_j(now):
            reward, kl = (mean_and_error(values)[0] for values in (look.reward, look.path_kl))
            self._kept.keep(fit, reward=reward, path_kl=kl if now else 0.0, fall=fall, fall_se=fall_se)
        self._count = self._count + regular if above else 0
        sentence = f"J on held-out noise is {with_error(rise, error)} above the {was:.4g} of the {self._first} model"
        reason = self._reason(fit, look, before, last, rise) if above else None
        if reason is not None:
            self._excess = rise + self._possible(fit)
            self.say(f"update {fit.updates}: {sentence}. Stopped: {reason}")
            return f"{sentence}: {reason}"
        if above and not self.above:
            self.say(
                f"update {fit.updates}: {sentence}: this training makes it worse. If that stays so, it will be stopped"
            )
        elif self.above and rise < 0:
            self.say(f"update {fit.updates}: J on held-out noise is {j:.4g}, below the {was:.4g} of before again")
        self.above = above or (self.above and not rise < 0)
        return None

    def settle(self, fit: Fit) -> str:
        """Put back the best model, and say what to change."""
        ends = ""
        if self._kept.restore(fit) and self._kept.numbers is not None:
            seen = self._kept.numbers
            ends = (
                f"The model is that of update {seen['updates']}, the best one that was seen below the {self._first} "
                f"model's J, by {with_error(seen['fall'], seen['fall_se'])}. "
            )
        fit.advice = f"Try {self.rate(smaller_rate(self._excess, self._possible(fit)))}"
        return f"{ends}{fit.advice}"

    def _reason(self, fit: Fit, look: Evaluation, before: Evaluation, last: bool, rise: float) -> str | None:
        """Why to stop now that J is above; None where the run may continue."""
        kl, most = mean_and_error(look.path_kl)[0], self.most(fit)
        if not kl <= FAR * most:
            return (
                f"the path KL is {kl:.3g} nats, and no sampler beyond {most:.3g} is as good as the {self._first} model"
            )
        if not kl <= most_sound(fit.chain) + mean_and_error(before.path_kl).mean:
            return f"the path KL is {kl:.3g} nats, at which nothing of the pretrained model is left"
        if not rise <= RISE * before.reward.double().std().item():
            return "it runs away"
        if last:
            return "training has ended there"
        return f"it was above at {self._count} evaluations in a row" if self._count >= self.patience else None

    def _is_far(self, fit: Fit) -> bool:
        """Whether the training's own path KL calls for an evaluation."""
        if "path_kl" not in fit.metrics or fit.updates < self._looked + max(1, self.held_out.every // 5):
            return False
        return not float(fit.metrics["path_kl"]) <= (FAR if self.above else 1.0) * self.most(fit)

    def most(self, fit: Fit) -> float:
        """The path KL beyond which no control is as good as the pretrained chain, at the smallest β so far."""
        beta = self._beta(fit)
        if self._most is None or self._most[0] != beta:
            samples, above = self._samples(fit), self._above(fit, beta)
            self._most = beta, most_kl(samples, beta, above) if beta > 0 else math.inf
        return self._most[1]

    def _possible(self, fit: Fit) -> float:
        """By how much J could fall at the present β."""
        samples, beta = self._samples(fit), fit.loop.objective.weight(PathKL)
        if not beta > 0:
            return math.nan
        return self._above(fit, beta) - mean_and_error(samples.reward)[0] - bound(samples, beta).j

    @property
    def _first(self) -> str:
        """What the chain is called that training begins with."""
        return "pretrained" if self.held_out.untrained is None else "untrained"

    def _above(self, fit: Fit, beta: float) -> float:
        """How much J of the chain that training begins with is above that of the pretrained one."""
        if self.held_out.untrained is None:
            return 0.0
        return mean_and_error(_j(self.held_out.begun(fit), beta) - _j(self.held_out.pretrained(fit), beta))[0]

    def _samples(self, fit: Fit) -> Evaluation:
        """Samples of the pretrained chain; where starts have a single trajectory each, two starts are taken as one."""
        seen = self.pretrained or self.held_out.pretrained(fit)
        if seen.reward.shape[1] > 1:
            return seen
        even = len(seen.reward) // 2 * 2
        return mapped(lambda values: torch.stack([values[0:even:2, 0], values[1:even:2, 0]], 1), seen)

    def _beta(self, fit: Fit) -> float:
        """The smallest β so far: a β that is raised to bring the path KL down raises J until it has done so."""
        self._lowest = min(self._lowest, fit.loop.objective.weight(PathKL))
        return self._lowest

    def _kept_j(self, beta: float) -> float:
        """J of the kept model, under the present β."""
        seen = self._kept.numbers
        return math.inf if seen is None else beta * seen["path_kl"] - seen["reward"]

    def state_dict(self) -> dict[str, Any]:
        """What was reported, evaluated and kept."""
        seen = {"above": self.above, "count": self._count, "looked": self._looked, "kept": self._kept.numbers}
        return seen | {"excess": self._excess if math.isfinite(self._excess) else None, "lowest": self._lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""
        self.above, self._count, self._looked = state["above"], state.get("count", 0), state.get("looked", 0)
        self._kept.numbers, self._lowest = state.get("kept"), state.get("lowest", math.inf)
        self._excess = math.nan if state.get("excess") is None else state["excess"]


def _j(seen: Evaluation, beta: float) -> Tensor:
    """J of every trajectory; a path KL without a weight may be infinite."""
    return seen.objective(beta) if beta else -seen.reward
