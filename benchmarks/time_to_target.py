"""How soon the queue and the nested loop get 90 % of the way, each at its best batch and learning rate.

    python benchmarks/time_to_target.py            # results/time_to_target-*.json and docs/figures/time_to_target.png
    python benchmarks/time_to_target.py --smoke    # the same path in a minute; its numbers mean nothing

On one CPU thread (`--threads 1`) the clock counts processor seconds, which a busy machine does not lengthen.

Brightness of digits, DDPM with N rows, Adam at a constant rate, norm clipped. Every run of the grid gets the same
seconds of training; evaluations on held-out noise stop the clock. The target is common to both loops: 90 % of the way
from J(u_0) to the lowest J that any run of the grid attained (mean of its last three evaluations). Each loop's best
batch and rate, by seconds to the target, then run again under fresh seeds, and these runs are what is reported.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import DEVICE, DIGITS, FIGURES, Problem, hardware, save, synchronize

from implicit_diffusion import Chain, Nested, Noise, Queue, Update, evaluate
from implicit_diffusion.commands.shared.drawing import finish_figure, sheet
from implicit_diffusion.evaluation.chains import mean_and_error

LOOPS = {"queue": Queue, "nested": Nested}
COLOURS = {"queue": "#1f6f8b", "nested": "#c8553d"}


@dataclass(frozen=True)
class Config:
    """The published setting."""

    num_steps: int = 10
    batches: tuple[int, ...] = (4, 8, 16, 32)
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    seconds: float = 60.0  # of training, per run
    points: int = 30  # evaluations per run, equally far apart in training seconds
    held_out: int = 256  # trajectories per evaluation
    share: float = 0.9
    seeds: int = 3
    threads: int = 0  # 0: torch's own choice
    smoke: bool = False


SMOKE = {"batches": (4,), "rates": (1e-4,), "seconds": 4.0, "points": 3, "held_out": 32, "seeds": 1}


def run(config: Config, problem: Problem = DIGITS) -> dict[str, Any]:
    start, start_se = held_out(problem.chain(config.num_steps), config, problem)
    grid = [curve(*case, 0, config, problem) for case in itertools.product(LOOPS, config.batches, config.rates)]
    final = min(mean(point["j"] for point in run["curve"][-3:]) for run in grid)
    target = start - config.share * (start - final)
    for each in grid:
        each |= reached(each["curve"], target)
    best = {name: min((g for g in grid if g["loop"] == name), key=_soonest) for name in LOOPS}
    runs = []
    for name, seed in itertools.product(LOOPS, range(1, config.seeds + 1)):
        again = curve(name, best[name]["batch"], best[name]["rate"], seed, config, problem)
        runs.append(again | reached(again["curve"], target))
    return {"j_before": start, "j_before_se": start_se, "j_final": final, "target": target, "grid": grid, "runs": runs}


def _soonest(run: dict[str, Any]) -> float:
    return math.inf if run["seconds_to_target"] is None else run["seconds_to_target"]


def clock(config: Config) -> Callable[[], float]:
    return time.process_time if config.threads == 1 and DEVICE == "cpu" else time.perf_counter


def curve(name: str, batch: int, rate: float, seed: int, config: Config, problem: Problem) -> dict[str, Any]:
    """One training run: J on held-out noise against seconds, network evaluations and updates."""
    chain = problem.chain(config.num_steps)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=rate)
    update = Update(adam, max_grad_norm=problem.deviation)
    loop = LOOPS[name](chain, problem.objective(), update, batch=batch, noise=Noise(seed))
    spent, points, now = 0.0, [], clock(config)
    for due in range(config.points + 1):
        while spent < due * config.seconds / config.points:
            begin = now()
            loop.step()
            synchronize()
            spent += now() - begin
        j, j_se = held_out(chain, config, problem)
        points.append({"seconds": spent, **loop.cost(), "updates": loop.update.updates})
        points[-1] |= {"j": j, "j_se": j_se}
    print(
        f"{name:6} B {batch:<3} rate {rate:g} seed {seed}: {loop.update.updates} updates, J {j:.4f} ± {j_se:.4f}",
        flush=True,
    )
    return {"loop": name, "batch": batch, "rate": rate, "seed": seed, "curve": points}


def held_out(chain: Chain, config: Config, problem: Problem) -> tuple[float, float]:
    """J and its standard error on noise that no run trains on, the same at every call."""
    result = evaluate(chain, problem.reward, Noise(0).stream(1), starts=config.held_out)
    return mean_and_error(result.objective(problem.beta, control_variate=True))


def reached(points: list[dict[str, Any]], target: float) -> dict[str, float | None]:
    """Where the curve first crosses the target, by linear interpolation; None where it does not."""
    axes = ("seconds", "network_evaluations", "updates")
    for before, after in itertools.pairwise(points):
        if after["j"] <= target:
            part = (before["j"] - target) / (before["j"] - after["j"])
            return {f"{axis}_to_target": before[axis] + part * (after[axis] - before[axis]) for axis in axes}
    return dict.fromkeys(f"{axis}_to_target" for axis in axes)


def plot(results: dict[str, Any], path: Path) -> None:
    """J against seconds and against network evaluations: every seed thin, their mean over points thick."""
    figure = sheet(9.2, 3.9)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("seconds", "network_evaluations")):
        for name, colour in COLOURS.items():
            runs = [run for run in results["runs"] if run["loop"] == name]
            xs = [[point[what] for point in run["curve"]] for run in runs]
            js = [[point["j"] for point in run["curve"]] for run in runs]
            for x, j in zip(xs, js):
                axis.plot(x, j, color=colour, lw=0.8, alpha=0.35)
            x, j = [mean(column) for column in zip(*xs)], [mean(column) for column in zip(*js)]
            label = f"{name}, {runs[0]['batch']} per update, rate {runs[0]['rate']:g}"
            axis.plot(x, j, color=colour, lw=2.2, label=label)
            times = [t for run in runs if (t := run[f"{what}_to_target"]) is not None]
            axis.plot(times, [results["target"]] * len(times), "o", color=colour, ms=5, mec="white", mew=0.8, zorder=3)
        axis.axhline(results["target"], color="0.5", ls=":", lw=1.2)
    share = f"{100 * results['config']['share']:g} %"
    axes[0].text(
        0.01,
        results["target"],
        f"{share} of the way",
        transform=axes[0].get_yaxis_transform(),
        ha="left",
        va="top",
        color="0.4",
    )
    one = results["config"]["threads"] == 1
    axes[0].set(
        xlabel="seconds of training" + (", one thread" if one else ""),
        ylabel="J on held-out noise",
        title="By the clock",
    )
    axes[1].set(xlabel="network evaluations (samples × calls)", title="By the work done")
    axes[1].xaxis.set_major_formatter(lambda v, _: f"{v / 1e3:g}k" if v else "0")
    axes[1].plot([], [], "o", color="0.4", ms=5, mec="white", label="where a seed first gets there")
    axes[1].legend(frameon=False, loc="upper right")
    finish_figure(figure, path, axes)


def main(config: Config) -> None:
    if config.smoke:
        config = replace(config, **SMOKE)
    if config.threads:
        torch.set_num_threads(config.threads)
    setting = {name: getattr(config, name) for name in Config.__dataclass_fields__}
    results = hardware() | {"config": setting | {"beta": DIGITS.beta, "max_grad_norm": DIGITS.deviation}} | run(config)
    for each in results["runs"]:
        took = each["seconds_to_target"]
        print(f"{each['loop']}, seed {each['seed']}:", "not reached" if took is None else f"{took:.1f} s to the target")
    suffix = "_smoke" if config.smoke else ""
    print("wrote", save(f"time_to_target{suffix}", results))
    figure = Path(f"{FIGURES / 'time_to_target'}{suffix}.png")
    FIGURES.mkdir(parents=True, exist_ok=True)
    plot(results, figure)
    print("wrote", figure)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
