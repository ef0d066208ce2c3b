"""Which estimator when: every way of fine-tuning a chain for a reward, on the same problems, in the same harness.

    gradients    bias, variance, cosine to the exact gradient, seconds, memory and network evaluations, at a fixed θ
    training     J on held-out noise against network evaluations and seconds, each method with its own learning rate,
                 searched on a grid whose best value is inside

Methods are `methods.METHODS`; those that others use are as faithful as one harness allows, and the modules that make
them say what is simplified. All methods see the same objective J = −E R + β KL(path), β one deviation of the reward.

Every gradient measurement, every trial of a search, and every training is kept as soon as it has ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from implicit_diffusion.commands.compare.config import Config
from implicit_diffusion.commands.compare.figure import draw
from implicit_diffusion.commands.compare.methods import METHODS, applies
from implicit_diffusion.commands.compare.policy import GROUP
from implicit_diffusion.commands.compare.problems import Problem, build
from implicit_diffusion.commands.compare.quality import Exact, exact, measure
from implicit_diffusion.commands.compare.summary import Point, ProblemSummary, Quality, Reached, Search, Summary
from implicit_diffusion.commands.compare.table import show, write_report
from implicit_diffusion.commands.compare.training import (
    JUDGE,
    SEARCH,
    TRAIN,
    Budget,
    Judge,
    first_setting,
    search,
    summarise,
    train,
)
from implicit_diffusion.commands.shared.opening import study
from implicit_diffusion.commands.shared.summaries import from_json, read_summary, to_json
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import check_divides, main_only, world_size
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.study import Study


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """All methods on all problems, summary, figure, report; returns what summary.json holds.

    Args:
        config: the options.
        directory: of an interrupted comparison to continue; None begins a new one.

    Raises:
        InvalidInputError: a number out of range, or an `out` with something in it.
    """
    config.check()
    check_methods(config)
    check_batch(config)
    with study("compare", config, directory) as (config, directory):
        trainings = Study(directory, config.keep)
        summary = Summary([], [], [])
        for name in config.problems:
            comparison = Comparison(name, config, trainings)
            summary.problems.append(comparison.described())
            if config.batches and comparison.problem.smooth is not None:
                summary.gradients.extend(comparison.gradients())
            if config.updates:
                summary.reached.extend(comparison.trainings())
        return _conclude(summary, directory)


def check_methods(config: Config) -> None:
    """Raise `InvalidInputError` where no method applies to one of the problems."""
    for problem in config.problems:
        if not any(applies(method, problem) for method in config.methods):
            fitting = ", ".join(method for method in METHODS if applies(method, problem))
            raise InvalidInputError(
                f"--methods {' '.join(config.methods)}: each needs the gradient of the reward, which {problem} does "
                f"not have; add one of {fitting}"
            )


def check_batch(config: Config) -> None:
    """Raise `InvalidInputError` where processes cannot have equally many samples, or groups of them."""
    if "grpo" in config.methods and config.batch % (GROUP * world_size()):
        raise InvalidInputError(
            f"--batch must be a multiple of {GROUP * world_size()}, got {config.batch}: grpo makes groups of {GROUP}, "
            f"which are shared out over {world_size()} processes"
        )
    check_divides("batch", config.batch)


@main_only
def _conclude(summary: Summary, directory: RunDirectory) -> dict[str, Any]:
    """Summary, figure and report; returns what summary.json holds."""
    written: dict[str, Any] = to_json(summary)
    if summary.reached:
        draw(summary, directory.figure("comparison"))
    directory.write_summary(written)
    write_report(summary, directory)  # the last file: with it, the run is finished
    show(summary, directory.path)
    return written


@main_only
def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figure of a finished comparison again, write its report, print its table, and return its summary."""
    return _conclude(read_summary(Summary, directory), directory)


class Comparison:
    """All methods on one problem.

    Args:
        name: of the problem.
        config: the options.
        study: keeps what has ended.
    """

    def __init__(self, name: str, config: Config, study: Study) -> None:
        self.config, self.study, self.noise = config, study, Noise(config.seed)
        self.problem: Problem = build(name, config.num_steps, config.held_out, self.noise)
        self.budget = Budget(config.updates, config.batch, config.depth, config.points, config.held_out)
        self.methods = [method for method in METHODS if method in config.methods and applies(method, name)]
        self.judges: dict[tuple[int, ...], Judge] = {}

    def described(self) -> ProblemSummary:
        """The problem itself."""
        best = self.problem.best
        return ProblemSummary(self.problem.name, self.problem.beta, self.problem.before, Estimate(best.j, best.j_se))

    def gradients(self) -> list[Quality]:
        """The quality of every method's gradients."""
        config, problem = self.config, self.problem

        @cache
        def at() -> Exact:
            return exact(problem, config.batch, problem.many * config.batches, self.noise)

        def make(method: str) -> dict[str, Any]:
            quality: dict[str, Any] = to_json(measure(problem, method, at(), config.batch, config.depth, self.noise))
            return quality

        methods = [method for method in self.methods if METHODS[method].measured]
        kept = []
        with progress(len(methods), f"{problem.name}, gradients") as bar:
            for method in methods:
                kept.append(self._once("gradient", method, make=partial(make, method)))
                bar.update()
        return [from_json(Quality, each) for each in kept]

    def trainings(self) -> list[Reached]:
        """What every method reaches, with the setting that its search finds best."""
        methods = [method for method in self.methods if METHODS[method].trains]
        reached = []
        with progress(len(methods), f"{self.problem.name}, training") as bar:
            for method in methods:
                searched = self._search(method)
                seeds = range(self.config.seed, self.config.seed + self.config.seeds)
                curves = [self._curve(method, searched.best, seed) for seed in seeds]
                reached.append(summarise(self.problem, method, searched, curves))
                bar.update()
        return reached

    def _search(self, method: str) -> Search:
        spent = []

        def fall_at(setting: float) -> float:
            def make() -> list[dict[str, Any]]:
                noise, judge = self.noise.stream(SEARCH, TRAIN), self._judge(SEARCH, JUDGE)
                trial = train(self.problem, method, setting, self.budget, noise, judge, points=1)
                return [to_json(point) for point in trial]

            trial = [from_json(Point, point) for point in self._once("search", method, setting, make=make)]
            spent.append(trial[-1].evaluations if trial else self.budget.evaluations(self.problem.pretrained))
            return trial[-1].fall.mean if trial else -math.inf

        first = first_setting(self.problem, method, self.config.factor)
        return replace(search(fall_at, widest=self.config.widest, **first), evaluations=sum(spent))

    def _curve(self, method: str, setting: float, seed: int) -> list[Point]:
        def make() -> list[dict[str, Any]]:
            noise, judge = Noise(seed).stream(TRAIN), self._judge(JUDGE)
            curve = train(self.problem, method, setting, self.budget, noise, judge, self.config.points)
            return [to_json(point) for point in curve]

        def lines(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{"problem": self.problem.name, "arm": method, "seed": seed} | point for point in curve]

        kept = self._once("train", method, setting, seed, make=make, lines=lines)
        return [from_json(Point, point) for point in kept]

    def _judge(self, *stream: int) -> Judge:
        """The judge on a stream of noise, made once."""
        if stream not in self.judges:
            self.judges[stream] = Judge(self.problem, self.noise.stream(*stream), self.config.held_out)
        return self.judges[stream]

    def _once(self, *key: str | int | float, make: Callable[[], Any], lines: Any = None) -> Any:
        return self.study.once(self.problem.name, *key, make=make, lines=lines)
