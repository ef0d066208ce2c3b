"""All arms of energy-based training on one law of the plane, at equal cost, each with the best rate of a grid.

The grid is searched on one seed of its own; arms that diverge at a rate count as infinitely bad there. "hmc" is there
to show what the weights do, and has the rate of "weighted". Step sizes are not searched.

Every training is a line of metrics.jsonl as soon as it has ended, so an interrupted comparison can be continued.
"""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from implicit_diffusion.commands.ebm.arms import ARMS, Settings, make_loop, pulls_per_update
from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.data import load_data
from implicit_diffusion.commands.ebm.judging import JUDGE, log_z_by_annealing
from implicit_diffusion.commands.ebm.summary import ComparedArm, ComparedTraining, Comparison, CurvePoint, Paired
from implicit_diffusion.commands.ebm.training import train
from implicit_diffusion.commands.shared.opening import continuing
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.commands.shared.summaries import from_json, to_json
from implicit_diffusion.errors import DivergenceError, InvalidInputError, NonFiniteError
from implicit_diffusion.extras import require
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import from_main, main_only
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.provenance import check_version, record, verified
from implicit_diffusion.runs.records import as_json

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID_SEED = 1000  # beyond those of the runs


def compare(config: Config, directory: RunDirectory) -> dict[str, Any]:
    """Every arm on every seed; returns what summary.json holds.

    Args:
        config: the options.
        directory: of the comparison, new or with the beginning of the same one.

    Raises:
        InvalidInputError: data without a known law, too few steps for some arm, or a directory with something else.
        KeyboardInterrupt: interrupted; the same command continues it, and may ask for more seeds.
    """
    with directory.held():
        data = load_data(config.data, Noise(config.seed))
        if data.law is None:
            raise InvalidInputError(
                f"--compare needs a law of the plane, whose exact KL is known, got --data {config.data}"
            )
        resolved = config.resolved(data)
        check_version(directory, advice="choose another --out")
        check_comparison_folder(directory, resolved)
        with verified(directory, advice="choose another --out"):
            weighted = config.settings(data)
            for arm in ARMS:
                settings = at_equal_cost(weighted, arm)
                if settings.updates < 1:
                    raise InvalidInputError(
                        f"--steps {config.steps} are too few: their cost is that of no update of {arm}"
                    )
                make_loop(settings, data)
            directory.write_config(resolved, "ebm")
            out = shlex.quote(str(directory.path))
            with continuing(directory, f"the same command, with --out {out}, continues the comparison"):
                record(directory, resolved, {})
                assert resolved.seeds is not None and resolved.judge_steps is not None
                trainings = Trainings(config.data, weighted, resolved.judge_steps, directory)
                return _compare(trainings, range(config.seed, config.seed + resolved.seeds))


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the picture of a finished comparison again, and write and print its numbers, from its trainings.

    Raises:
        InvalidInputError: a training is missing in metrics.jsonl.
    """
    config = read_options(Config, directory)
    assert config.seeds is not None and config.judge_steps is not None  # resolved
    weighted = config.settings(load_data(config.data, Noise(config.seed)))
    trainings = Trainings(config.data, weighted, config.judge_steps, directory, complete=True)
    return _compare(trainings, range(config.seed, config.seed + config.seeds))


def _compare(trainings: Trainings, seeds: range) -> dict[str, Any]:
    """Search the rates, and train every arm on all seeds, as far as that is not done; then draw and print."""
    grid: dict[str, dict[str, float | None]] = {}
    arms: dict[str, ComparedArm] = {}
    advice: list[str] = []
    curves: dict[str, dict[int, list[CurvePoint]]] = {}  # by arm and seed
    for arm in ARMS:
        kls: dict[float, float] = {}
        if arm == "hmc":  # weighted without its weights, and nothing else
            best = arms["weighted"].lr
        else:
            kls = {lr: final_kl(trainings.get(arm, lr, GRID_SEED, judged=False)) for lr in GRID}
            best = min(kls, key=kls.__getitem__)
            advice += at_the_edge(arm, best) if math.isfinite(kls[best]) else []
        runs = [trainings.get(arm, best, seed) for seed in seeds]
        grid[arm] = {f"{lr:g}": kl if math.isfinite(kl) else None for lr, kl in kls.items()}
        arms[arm] = summarise(best, runs)
        curves[arm] = {run.seed: run.curve for run in runs if run.curve is not None}
        print(f"{arm:9s} lr {best:g}  KL {arms[arm].kl}", flush=True)
    pairs = {arm: paired(curves["weighted"], curves[arm]) for arm in ARMS[1:]}
    comparison = Comparison(trainings.data, grid, arms, advice, pairs)
    return from_main(lambda: _conclude(comparison, curves, trainings.directory))


def _conclude(
    comparison: Comparison, curves: dict[str, dict[int, list[CurvePoint]]], directory: RunDirectory
) -> dict[str, Any]:
    """Figure and table; returns what summary.json holds."""
    from implicit_diffusion.commands.ebm.comparison_figure import draw_comparison

    draw_comparison(comparison.data, {arm: list(by.values()) for arm, by in curves.items()}, directory)
    written: dict[str, Any] = to_json(comparison)
    directory.write_summary(written)
    show(comparison, directory.path)
    return written


@main_only
def check_comparison_folder(directory: RunDirectory, resolved: Config) -> None:
    """Raise `InvalidInputError` unless the folder is new, empty, or holds a comparison of the same options.

    The number of seeds may differ.
    """
    out, saved, asked = directory.path, directory.read_config() or {}, as_json(resolved)
    if not (out / "config.json").is_file():
        directory.check(out)
        return
    named = set(saved) | set(asked)
    different = [name for name in sorted(named - {"out", "seeds"}) if saved.get(name) != asked.get(name)]
    if different:
        changes = ", ".join(f"{name} was {saved.get(name)!r} and is {asked.get(name)!r}" for name in different)
        raise InvalidInputError(f"--out {out} holds a run of other options: {changes}; choose another --out")


def at_the_edge(arm: str, best: float) -> list[str]:
    """A sentence where the best rate is the smallest or the largest of the grid."""
    beyond = {min(GRID): "smaller", max(GRID): "larger"}.get(best)
    return [f"{arm}: its best rate {best:g} is at the edge of the grid; a {beyond} one may be better"] if beyond else []


def at_equal_cost(weighted: Settings, arm: str) -> Settings:
    """As many updates of an arm as cost the pulls of the weighted arm's; without refreshments."""
    budget = weighted.updates * pulls_per_update("weighted", weighted.moves)
    return replace(weighted, arm=arm, refresh=0, updates=budget // pulls_per_update(arm, weighted.moves))


class Trainings:
    """Trainings at the cost of the weighted arm's, made or read back from metrics.jsonl.

    Args:
        data: name of the law.
        weighted: settings of the weighted arm; the rate and the seed are those of each training.
        judge_steps: of the annealing for log Z of weighted trainings.
        directory: of the comparison.
        complete: whether all are there, so that a missing one is an error.
    """

    def __init__(
        self, data: str, weighted: Settings, judge_steps: int, directory: RunDirectory, *, complete: bool = False
    ) -> None:
        self.data, self.weighted, self.judge_steps, self.directory = data, weighted, judge_steps, directory
        self.complete = complete
        directory.forget_metrics(sys.maxsize)  # only a line that was cut short
        finished = (from_json(ComparedTraining, line) for line in directory.read_metrics())
        self.finished: dict[tuple[str, float, int], ComparedTraining] = {(t.arm, t.lr, t.seed): t for t in finished}

    def get(self, arm: str, lr: float, seed: int, *, judged: bool = True) -> ComparedTraining:
        """A training; `judged` ones have a curve of several points, and an estimate of log Z in the weighted arm."""
        if (arm, lr, seed) not in self.finished:
            if self.complete:
                raise InvalidInputError(
                    f"{self.directory.path}/metrics.jsonl lacks the training of {arm} at --lr {lr:g}, seed {seed}; the "
                    "`ebm --compare` command with the same --out makes it again"
                )
            settings = replace(at_equal_cost(self.weighted, arm), lr=lr, seed=seed)
            training = attempt(self.data, settings, self.judge_steps if judged else None)
            self.directory.append_metrics(to_json(training))
            self.finished[arm, lr, seed] = training
        return self.finished[arm, lr, seed]


def attempt(name: str, settings: Settings, judge_steps: int | None) -> ComparedTraining:
    """One training on the law `name`; one that diverges is a result as well.

    Args:
        name: of the law.
        settings: what to do.
        judge_steps: of the annealing for log Z of a weighted training; None where only the KL at the end is needed.
    """
    data, arm = load_data(name, Noise(settings.seed)), settings.arm
    try:
        run = train(settings, data, make_loop(settings, data), None, 1 if judge_steps is None else 8)
        if run.fit.stopped:
            raise KeyboardInterrupt
        curve = list(run.curve)
        if judge_steps is not None and arm == "weighted":
            log_z, log_z_se = log_z_by_annealing(run.model, Noise(settings.seed).stream(JUDGE), judge_steps)
            curve[-1] = replace(curve[-1], log_z_estimate=log_z, log_z_estimate_se=log_z_se)
        training = ComparedTraining(
            arm, settings.lr, settings.seed, run.fit.updates, None, seconds=run.fit.seconds, curve=curve
        )
        as_json(to_json(training))  # which refuses NaN and infinity
        return training
    except (DivergenceError, NonFiniteError) as error:
        print(f"{arm}, lr {settings.lr:g}, seed {settings.seed}: {error}", flush=True)
        return ComparedTraining(arm, settings.lr, settings.seed, settings.updates, str(error))


def final_kl(training: ComparedTraining) -> float:
    """The exact KL at the end; infinite for a training that diverged."""
    return math.inf if training.curve is None else training.curve[-1].kl


def summarise(lr: float, trainings: list[ComparedTraining]) -> ComparedArm:
    """Means over the seeds that came through."""
    through = [training for training in trainings if training.curve]
    diverged = len(trainings) - len(through)
    if not through:
        return ComparedArm(lr, diverged, None, None)
    last = [training.curve[-1] for training in through if training.curve]
    kls = [p.kl for p in last]
    mode_errors = [p.mode_error for p in last if p.mode_error is not None]
    estimates = [
        (p.log_z_estimate - p.log_z, p.log_z_estimate_se)
        for p in last
        if p.log_z_estimate is not None and p.log_z_estimate_se is not None
    ]
    return ComparedArm(
        lr,
        diverged,
        mean(kls),
        stdev(kls) if len(kls) > 1 else None,
        kls=kls,
        nll=mean(p.nll for p in last),
        seconds=mean(training.seconds or 0.0 for training in through),
        gradient_evaluations=last[0].gradient_evaluations,
        mode_error=mean(mode_errors) if mode_errors else None,
        log_z_z_scores=[error / se for error, se in estimates] or None,
        log_z_errors=[error for error, _ in estimates] or None,
    )


def paired(ours: dict[int, list[CurvePoint]], theirs: dict[int, list[CurvePoint]]) -> Paired | None:
    """Weighted against another arm, by the ends of their curves by seed; None where a seed is missing."""
    if ours.keys() != theirs.keys() or len(ours) < 2:
        return None
    ratios = [math.log(curve[-1].kl / theirs[seed][-1].kl) for seed, curve in ours.items()]
    return Paired(mean(ratios), stdev(ratios) / math.sqrt(len(ratios)))


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f" ± {spread:.2g}"


def show(comparison: Comparison, folder: Path) -> None:
    """Print the arms as a table, and the folder of the comparison."""
    require("rich")
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title=f"Exact KL(data‖model) on {comparison.data}, nats, at equal cost",
        caption="± deviation over seeds. modes: total variation of their masses. log ratio: of weighted's KL to the "
        "arm's, paired over seeds, ± s.e.",
    )
    for column in ("arm", "lr", "KL", "modes", "log ratio", "failed", "s"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, arm in comparison.arms.items():
        ratio = comparison.paired.get(name)
        table.add_row(
            name,
            f"{arm.lr:g}",
            "–" if arm.kl is None else f"{arm.kl:.3g}" + _plus_minus(arm.kl_std),
            "" if arm.mode_error is None else f"{arm.mode_error:.3f}",
            f"{ratio.log_ratio:.2f}" + _plus_minus(ratio.se) if ratio else "",
            f"{arm.diverged}" if arm.diverged else "",
            "" if arm.seconds is None else f"{arm.seconds:.0f}",
        )
    Console().print(table)
    scores = comparison.arms["weighted"].log_z_z_scores or []
    print("z-scores of log Z: " + ", ".join(f"{z:+.2f}" for z in scores))
    for line in comparison.advice:
        print(f"advice    {line}")
    print(f"run       {folder}")
