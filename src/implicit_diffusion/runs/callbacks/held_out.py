"""Evaluation of a run on noise that training never sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from implicit_diffusion.evaluation import Evaluation, evaluate
from implicit_diffusion.evaluation.chains import mean_and_error, moved
from implicit_diffusion.function_checks import TRIED
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward, WeightedRewards
from implicit_diffusion.objectives.reward import as_reward
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.state import Fit
from implicit_diffusion.samplers.chain import TRIAL, Chain
from implicit_diffusion.showing import Shown


def each_reward(name: str) -> str:
    """The name of one of several rewards in the metrics, where it follows `held_out_`."""
    return f"reward/{name}"


def watched_reward(name: str) -> str:
    """The name of a reward that is only watched in the metrics, where it follows `held_out_`."""
    return f"judge/{name}"


def error_of(column: str) -> str:
    """The column of the standard error, `held_out_path_kl_se` or `held_out_reward_se/NAME`: no NAME can be it."""
    kind, slash, name = column.partition("/")
    return f"{kind}_se{slash}{name}"


@dataclass(repr=False)
class HeldOut(Shown):
    """Callback: reward and path KL of `fit.chain` on noise that training never sees, into the metrics.

    Of several `WeightedRewards` each as well, as `held_out_reward/NAME`, and as `held_out_judge/NAME` those that are
    only watched; their standard errors are `held_out_reward_se/NAME` and `held_out_judge_se/NAME`.

    Other callbacks may evaluate at other updates too (`look`); at one update all of them share one evaluation.

    Args:
        reward: R, (n, *event) → (n,); under a condition, and in other forms, as in `Reward`.
        noise: of the evaluation, the same at every call.
        every: number of updates between two evaluations.
        starts: number of trajectories of each.
        shown: number of samples that the evaluations of `look` keep.
        untrained: the chain that training begins with, where it is not the pretrained one.
    """

    reward: Callable[..., Any] | Reward
    noise: Noise
    every: int = 25
    starts: int = 128
    shown: int = 0
    untrained: Chain | None = field(default=None, repr=False)
    _last: tuple[tuple[Any, ...], Evaluation] | None = field(default=None, init=False, repr=False, compare=False)
    _before: dict[str, Evaluation] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.every == 0:
            self.look(fit)

    def look(self, fit: Fit) -> Evaluation:
        """The evaluation after the present update, with the samples shown; its numbers are in `fit.metrics` then."""
        which = fit.loop, fit.updates, fit.kept  # once another model is put back, it is another evaluation
        if self._last is not None and self._last[0] == which:
            return self._last[1]
        result = self.evaluate(fit)
        # of this line of the metrics, even if a later callback changes it
        beta = fit.metrics.get("kl_weight", fit.loop.objective.weight(PathKL))
        several = self._named(self.reward, result) if isinstance(self.reward, WeightedRewards) else ()
        for name, values in (
            ("reward", result.reward),
            ("path_kl", result.path_kl),
            ("objective", result.objective(beta)),
            *several,
        ):
            mean, error = mean_and_error(values)
            column = f"held_out_{name}"
            seen = {column: mean, error_of(column): error}  # NaN: a single start has no standard error
            fit.metrics |= {key: value for key, value in seen.items() if math.isfinite(value)}
        self._last = which, result
        return result

    def evaluate(self, fit: Fit) -> Evaluation:
        """Evaluate the chain as it is now, without samples but those shown; the metrics are left as they are."""
        chain = fit.chain
        score = self._score(fit)
        with part("held-out checks"):
            result = evaluate(chain, score, self.noise, starts=self.starts)
        nothing = result.reward[..., None][..., :0]
        return replace(result, samples=result.samples[: self.shown] if self.shown else nothing)

    @staticmethod
    def _named(reward: WeightedRewards, result: Evaluation) -> list[tuple[str, Tensor]]:
        """Each reward under its name in the metrics; a single one that is raised is R itself."""
        alone = sum(map(bool, reward.coefficients)) == 1
        rows = zip(reward.names, reward.coefficients, result.each_reward)
        return [(each_reward(n) if c else watched_reward(n), values) for n, c, values in rows if not (c and alone)]

    def pretrained(self, fit: Fit) -> Evaluation:
        """The pretrained chain on the same noise, so that differences have small errors; evaluated once."""
        return self._once(fit, "pretrained", fit.chain.pretrained())

    def begun(self, fit: Fit) -> Evaluation:
        """The chain that training began with, on the same noise; evaluated once."""
        return self.pretrained(fit) if self.untrained is None else self._once(fit, "untrained", self.untrained)

    def _once(self, fit: Fit, name: str, chain: Chain) -> Evaluation:
        if name not in self._before:
            score = self._score(fit)
            with part("held-out checks"):
                made = evaluate(chain, score, self.noise, starts=self.starts)
            self._before[name] = replace(made, samples=made.reward[..., None][..., :0])
        return moved(self._before[name], fit.chain.device)

    def state_dict(self) -> dict[str, Any]:
        """The evaluations that are made once, so that a resumed run need not draw them again."""
        columns = ("reward", "path_kl", "log_ratio", "rewards")
        names = ("pretrained", *["untrained"] * (self.untrained is not None))
        made = {name: self._before.get(name) for name in names}
        return {
            name: None if each is None else {column: getattr(each, column) for column in columns}
            for name, each in made.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""
        for name, columns in state.items():
            if columns is not None:
                self._before[name] = Evaluation(**columns, samples=columns["reward"][..., None][..., :0])

    def _score(self, fit: Fit) -> Reward:
        """The reward, checked once, on draws of its own: a resumed run checks it again."""
        score, chain = as_reward(self.reward), fit.chain
        if not score.checked:
            terms = [term for _, term in fit.loop.objective.terms if isinstance(term, Reward)]
            if not any(term.function is score.function for term in terms):  # those were checked by the loop
                with GlobalGenerators(self.noise, TRIAL, device=chain.device):
                    score.probe(chain.endpoint(chain.sample(self.noise, TRIED, TRIAL), self.noise, TRIAL))
            self.reward = score = score.as_checked()
        return score
