"""A training that makes J worse: said while it runs, stopped where it stays so, ended with the best model so far."""

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
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.kept import Kept
from implicit_diffusion.runs.callbacks.watch import RISE, most_sound
from implicit_diffusion.runs.console import Say, say_on_stderr
from implicit_diffusion.runs.state import Fit
from implicit_diffusion.showing import Shown, with_error

ERRORS, CLEAR = 4.0, 2.0  # standard errors by which J must have risen while there is more to come, and otherwise
FAR = 10.0  # times the path KL beyond which no sampler is as good as the pretrained one


def _times_smaller(factor: int) -> str:
    return f"a learning rate {factor} times smaller"


def smaller_rate(excess: float, possible: float) -> int:
    """By what power of ten to divide a learning rate: at it J stands `excess` above J*, before training `possible`.

    What gradient noise keeps J above its optimum is proportional to the rate: divided by excess/possible it would bring
    J back to where it began, and by the next power of ten below.
    """
    if not (possible > 0 and math.isfinite(excess)):
        return 10
    return int(10 ** min(6, max(1, math.ceil(math.log10(excess / possible)))))


@dataclass(repr=False)
class Rise(Shown):
    """Callback: stop a run whose J on held-out noise stays above the pretrained chain's, and go back to its best look.

    Both chains are looked at under the same noise, so that what J has risen by is a paired difference with a small
    error. Looks come after 1, 2, 4, … updates, after every `held_out.every`, and after the last. J is above where it
    has risen by four standard errors (two after the last update). The first such look is said; the run stops

    - when `patience` of the looks after every `held_out.every` updates found it above, one after the other. Those in
      between do not count: at the beginning, or at a high rate, J may pass a hump;
    - at once, when no hump has this height: a path KL ten times as large as the one beyond which no control at all is
      as good as the pretrained chain (`loops.bound.most_kl`: J ≤ J_before allows no more). The training's own path KL,
      which costs nothing, calls for a look when it is beyond that, at most five times in `held_out.every` updates;
    - after the last update.

    Where β moves, J is that of the smallest β so far, and of the last one after the last update.

    The look with the lowest J of all those clearly below the pretrained chain's is kept, and the model that the run
    ends with when it has stopped is that of this look, if there is one; elsewhere it is left as it is.

    Args:
        held_out: looks on held-out noise, whether or not they are a callback of the run as well; ≥ 2 starts.
        pretrained: samples of the pretrained chain, a plan's say, that tell what can be gained; by default the few of
            `held_out`.
        patience: looks.
        rate: what to try, in words, when the learning rate ought to be so many times smaller.
        say: gets what is said while the run goes on; by default it is printed on stderr.

    Raises:
        InvalidInputError: a single start; when called, a chain whose path KL is infinite, since it has trained rows
            without noise.
    """

    held_out: HeldOut
    pretrained: Evaluation | None = field(default=None, repr=False)
    patience: int = 3
    rate: Callable[[int], str] = field(default=_times_smaller, repr=False)
    say: Say = field(default=say_on_stderr, repr=False)
    above: bool = field(default=False, init=False)
    _count: int = field(default=0, init=False, repr=False)  # looks above, one after the other
    _looked: int = field(default=0, init=False, repr=False)  # update of the last look
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
        look, before, now = self.held_out.look(fit), self.held_out.pretrained(fit), fit.loop.objective.weight(PathKL)
        beta = now if last else self._beta(fit)
        if beta and not set(fit.chain.trained_rows).isdisjoint(fit.chain.table.noiseless()):
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
        sentence = f"J on held-out noise is {with_error(rise, error)} above the {was:.4g} of the pretrained model"
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
        """Put back the best look, and say what to change."""
        ends = ""
        if self._kept.restore(fit) and self._kept.numbers is not None:
            seen = self._kept.numbers
            ends = (
                f"The model is that of update {seen['updates']}, the best one that was seen below the pretrained "
                f"model's J, by {with_error(seen['fall'], seen['fall_se'])}. "
            )
        fit.advice = f"Try {self.rate(smaller_rate(self._excess, self._possible(fit)))}"
        return f"{ends}{fit.advice}"

    def _reason(self, fit: Fit, look: Evaluation, before: Evaluation, last: bool, rise: float) -> str | None:
        """Why it is time to stop, where J is above; None where it is not yet."""
        kl, most = mean_and_error(look.path_kl)[0], self.most(fit)
        if not kl <= FAR * most:
            return f"the path KL is {kl:.3g} nats, and no sampler beyond {most:.3g} is as good as the pretrained model"
        if not kl <= most_sound(fit.chain):
            return f"the path KL is {kl:.3g} nats, at which nothing of the pretrained model is left"
        if not rise <= RISE * before.reward.double().std().item():
            return "it runs away"
        if last:
            return "training has ended there"
        return f"it stood above at {self._count} looks, one after the other" if self._count >= self.patience else None

    def _is_far(self, fit: Fit) -> bool:
        """Whether the training's own path KL calls for a look."""
        if "path_kl" not in fit.metrics or fit.updates < self._looked + max(1, self.held_out.every // 5):
            return False
        return not float(fit.metrics["path_kl"]) <= (FAR if self.above else 1.0) * self.most(fit)

    def most(self, fit: Fit) -> float:
        """The path KL beyond which no control is as good as the pretrained chain, at the smallest β so far."""
        beta = self._beta(fit)
        if self._most is None or self._most[0] != beta:
            self._most = beta, most_kl(self._samples(fit), beta) if beta > 0 else math.inf
        return self._most[1]

    def _possible(self, fit: Fit) -> float:
        """What could be gained in J at the present β."""
        samples, beta = self._samples(fit), fit.loop.objective.weight(PathKL)
        return -mean_and_error(samples.reward)[0] - bound(samples, beta).j if beta > 0 else math.nan

    def _samples(self, fit: Fit) -> Evaluation:
        """Of the pretrained chain; starts of single trajectories in twos."""
        seen = self.pretrained or self.held_out.pretrained(fit)
        if seen.reward.shape[1] > 1:
            return seen
        even = len(seen.reward) // 2 * 2
        return Evaluation(*(torch.stack([value[0:even:2, 0], value[1:even:2, 0]], 1) for value in vars(seen).values()))

    def _beta(self, fit: Fit) -> float:
        """The smallest β so far: one that is raised to bring the path KL down raises J until it has."""
        self._lowest = min(self._lowest, fit.loop.objective.weight(PathKL))
        return self._lowest

    def _kept_j(self, beta: float) -> float:
        """J of what is kept, under the present β."""
        seen = self._kept.numbers
        return math.inf if seen is None else beta * seen["path_kl"] - seen["reward"]

    def state_dict(self) -> dict[str, Any]:
        """What was said last, seen and kept."""
        seen = {"above": self.above, "count": self._count, "looked": self._looked, "kept": self._kept.numbers}
        return seen | {"excess": self._excess if math.isfinite(self._excess) else None, "lowest": self._lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.above, self._count, self._looked = state["above"], state.get("count", 0), state.get("looked", 0)
        self._kept.numbers, self._lowest = state.get("kept"), state.get("lowest", math.inf)
        self._excess = math.nan if state.get("excess") is None else state["excess"]


def _j(seen: Evaluation, beta: float) -> Tensor:
    """J of every trajectory; a path KL that has no weight may be infinite."""
    return seen.objective(beta) if beta else -seen.reward
