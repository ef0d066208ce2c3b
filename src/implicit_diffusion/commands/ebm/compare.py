"""All arms of energy-based training on one law of the plane, at equal cost, each with the best rate of a grid.

The grid is searched on one seed of its own; arms that diverge at a rate count as infinitely bad there. "hmc" is there
to tell what the weights do, and takes the rate of "weighted". Step sizes are not searched.

Every training is a line of metrics.jsonl as soon as it has ended, so a comparison that was interrupted goes on.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from implicit_diffusion.commands.ebm.arms import ARMS, Settings, make_loop, pulls_per_update
from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.data import Data, load
from implicit_diffusion.commands.ebm.judging import JUDGE, log_z_by_annealing
from implicit_diffusion.commands.ebm.training import train
from implicit_diffusion.errors import DivergenceError, InvalidInputError, NonFiniteError
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.directory import dated, plain
from implicit_diffusion.runs.provenance import record, verified

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID_SEED = 1000  # beyond those of the runs


def compare(config: Config) -> dict[str, Any]:
    """Every arm on every seed; returns the summary.

    Raises:
        InvalidInputError: data without a known law, too few steps for some arm, or an `out` with something else in it
            than the beginning of the same comparison.
        KeyboardInterrupt: interrupted; the same command goes on, and may ask for more seeds.
    """
    directory = RunDirectory((config.out or dated(f"ebm-compare-{config.data}")).absolute())
    with directory.held():
        return _compare(config, directory)


def _compare(config: Config, directory: RunDirectory) -> dict[str, Any]:
    """The same in a directory that is held."""
    out = directory.path
    data = load(config.data, Noise(config.seed))
    if data.law is None:
        raise InvalidInputError(
            f"--compare needs a law of the plane, whose exact KL is known, got --data {config.data}"
        )
    resolved = replace(config.resolved(data), out=out)
    check_folder(out, resolved)
    with verified(directory, advice="choose another --out"):
        return _run(config, resolved, data, directory)


def _run(config: Config, resolved: Config, data: Data, directory: RunDirectory) -> dict[str, Any]:
    """The same, on what it rested on where it has begun before."""
    for arm in ARMS:
        settings = at_equal_cost(config.settings(data), arm)
        if settings.updates < 1:
            raise InvalidInputError(f"--steps {config.steps} are too few: their cost is that of no update of {arm}")
        make_loop(settings, data)
    directory.write_config(resolved)
    record(directory, resolved, {})
    trainings = Trainings(resolved, directory)
    summary: dict[str, Any] = {"data": config.data, "grid": {}, "arms": {}, "advice": []}
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {}  # by arm and seed
    assert resolved.seeds is not None
    for arm in ARMS:
        if arm == "hmc":  # weighted without its weights, and nothing else
            best, tried = summary["arms"]["weighted"]["lr"], {}
        else:
            tried = {lr: final_kl(trainings.find(arm, lr, GRID_SEED, judged=False)) for lr in GRID}
            best = min(tried, key=tried.__getitem__)
            summary["advice"] += at_the_edge(arm, best) if math.isfinite(tried[best]) else []
        seeds = range(config.seed, config.seed + resolved.seeds)
        runs = [trainings.find(arm, best, seed) for seed in seeds]
        summary["grid"][arm] = {f"{lr:g}": kl if math.isfinite(kl) else None for lr, kl in tried.items()}
        summary["arms"][arm] = {"lr": best} | _summarise(runs)
        curves[arm] = {seed: run["curve"] for seed, run in zip(seeds, runs) if run is not None}
        print(f"{arm:9s} lr {best:g}  KL {summary['arms'][arm]['kl']}", flush=True)
    summary["paired"] = {arm: paired(curves["weighted"], curves[arm]) for arm in ARMS[1:]}

    from implicit_diffusion.commands.ebm.figures import draw_comparison

    draw_comparison(config.data, {arm: list(by.values()) for arm, by in curves.items()}, directory)
    directory.write_summary(summary)
    show(summary, directory)
    return summary


def check_folder(out: Path, resolved: Config) -> None:
    """Raise `InvalidInputError` unless `out` is new, empty, or holds a comparison of the same options but for seeds."""
    if not (out / "config.json").is_file():
        RunDirectory.check(out)
        return
    saved, asked = json.loads((out / "config.json").read_text(encoding="utf-8")), plain(resolved)
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
    """Trainings at the cost of the weighted arm's `--steps` updates, made or read back from metrics.jsonl.

    Args:
        config: resolved.
        directory: of the comparison.
    """

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        directory.forget_metrics(sys.maxsize)  # only a line that was cut short
        self.made = {(m["arm"], m["lr"], m["seed"]): m for m in directory.read_metrics()}

    def find(self, arm: str, lr: float, seed: int, *, judged: bool = True) -> dict[str, Any] | None:
        """Its `curve` of exact figures and its `seconds`; None where it diverged."""
        if (arm, lr, seed) not in self.made:
            made = plain({"arm": arm, "lr": lr, "seed": seed} | attempt(self.config, arm, lr, seed, judged=judged))
            self.directory.append_metrics(made)
            self.made[arm, lr, seed] = made
        found = self.made[arm, lr, seed]
        return None if found["diverged"] else found


def attempt(config: Config, arm: str, lr: float, seed: int, *, judged: bool = True) -> dict[str, Any]:
    """One training: what `Trainings.find` returns, with its `updates`, and why it `diverged`, if it did."""
    data = load(config.data, Noise(seed))
    settings = replace(at_equal_cost(config.settings(data), arm), lr=lr, seed=seed)
    try:
        run = train(settings, data, make_loop(settings, data), None, 8 if judged else 1)
        if run.fit.stopped:
            raise KeyboardInterrupt("interrupted; the same command with the same --out goes on")
        last = run.curve[-1]
        if judged and arm == "weighted":
            assert config.judge_steps is not None
            noise = Noise(seed).stream(JUDGE)
            last["log_z_estimate"], last["log_z_estimate_se"] = log_z_by_annealing(run.model, noise, config.judge_steps)
        return plain(
            {"updates": run.fit.updates, "seconds": run.fit.seconds, "curve": run.curve, "diverged": None}
        )  # which holds no infinity
    except (DivergenceError, NonFiniteError) as error:
        print(f"{arm}, lr {lr:g}, seed {seed}: {error}", flush=True)
        return {"updates": settings.updates, "diverged": str(error)}


def final_kl(run: dict[str, Any] | None) -> float:
    """The exact KL at the end; infinite for a run that diverged."""
    return math.inf if run is None else run["curve"][-1]["kl"]


def _summarise(runs: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Means over the seeds that came through."""
    through = [run for run in runs if run is not None]
    found: dict[str, Any] = {"diverged": len(runs) - len(through), "kl": None}
    if not through:
        return found
    last = [run["curve"][-1] for run in through]
    found |= {"kl": mean(p["kl"] for p in last), "kl_std": stdev(p["kl"] for p in last) if len(last) > 1 else None}
    found |= {"kls": [p["kl"] for p in last], "nll": mean(p["nll"] for p in last)}
    found["seconds"] = mean(run["seconds"] for run in through)
    found["gradient_evaluations"] = last[0]["gradient_evaluations"]
    if "mode_error" in last[0]:
        found["mode_error"] = mean(p["mode_error"] for p in last)
    if "log_z_estimate" in last[0]:
        found["log_z_z_scores"] = [(p["log_z_estimate"] - p["log_z"]) / p["log_z_estimate_se"] for p in last]
        found["log_z_errors"] = [p["log_z_estimate"] - p["log_z"] for p in last]
    return found


def paired(ours: dict[int, list[dict[str, Any]]], theirs: dict[int, list[dict[str, Any]]]) -> dict[str, float] | None:
    """Mean over seeds of log(our KL/their KL) and its standard error; None where a seed is missing."""
    if ours.keys() != theirs.keys() or len(ours) < 2:
        return None
    ratios = [math.log(curve[-1]["kl"] / theirs[seed][-1]["kl"]) for seed, curve in ours.items()]
    return {"log_ratio": mean(ratios), "se": stdev(ratios) / math.sqrt(len(ratios))}


def _plus_minus(spread: float | None) -> str:
    return "" if spread is None else f" ± {spread:.2g}"


def show(summary: dict[str, Any], directory: RunDirectory) -> None:
    """Print the arms as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title=f"Exact KL(data‖model) on {summary['data']}, nats, at equal cost",
        caption="± deviation over seeds. modes: total variation of their masses. log ratio: of weighted's KL to the "
        "arm's, paired over seeds, ± s.e.",
    )
    for column in ("arm", "lr", "KL", "modes", "log ratio", "failed", "s"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, arm in summary["arms"].items():
        ratio = summary["paired"].get(name)
        table.add_row(
            name,
            f"{arm['lr']:g}",
            "–" if arm["kl"] is None else f"{arm['kl']:.3g}" + _plus_minus(arm.get("kl_std")),
            f"{arm['mode_error']:.3f}" if "mode_error" in arm else "",
            f"{ratio['log_ratio']:.2f}" + _plus_minus(ratio["se"]) if ratio else "",
            f"{arm['diverged']}" if arm["diverged"] else "",
            f"{arm['seconds']:.0f}" if "seconds" in arm else "",
        )
    Console().print(table)
    scores = summary["arms"]["weighted"].get("log_z_z_scores", [])
    print("z-scores of log Z: " + ", ".join(f"{z:+.2f}" for z in scores))
    for line in summary["advice"]:
        print(f"advice    {line}")
    print(f"run       {directory.path}")
