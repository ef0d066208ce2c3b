"""Training an energy-based model with one Langevin step per update, beside torchebm's contrastive divergence.

    python benchmarks/ebm.py            # tables, and results/ebm-*.json; some minutes on one idle thread
    python benchmarks/ebm.py --quick    # the same without compilation, and with numbers that mean nothing

The same network with the same initial weights, the same standardised data and batch, the same h, Adam, thread; k = 1.
*Ours* is `Single`: one forward and one backward pass at particles and data serve sampler and Γ. *Theirs* moves the
particles (a forward and a backward), then takes its loss at data and particles (two forwards, one backward). *Ours,
weighted* moves its particles by HMC; *theirs, HMC* has torchebm's at the same step size, to tell HMC from weights.

Two questions: what an iteration costs, and when the exact KL(data‖model), by quadrature, first stays below a target.
Each side runs in a process of its own, one at a time and in turns; clocks stop while the KL is computed. Each arm has
the best learning rate of one grid, found on a seed of its own; rates stay constant, and nothing is averaged.

How the sides are built, and what was set so that both do the same: ebm_sides.py.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from statistics import geometric_mean, median
from typing import Any

import torch
import tyro
from common import DEVICE, machine, ratio, save
from ebm_sides import (
    COMPILED,
    EAGER,
    LANGEVIN,
    PASSES,
    Config,
    check_step,
    curve,
    facts,
    microseconds,
    network,
    reached,
)


def iteration_table(config: Config, call: Callable[..., Any]) -> list[dict[str, Any]]:
    """Time per iteration of all arms, in turns."""
    rows = []
    arms = EAGER if config.quick else EAGER + COMPILED
    for n in config.sizes:
        known = {arm: call(facts, config, arm, n) for arm in EAGER}
        assert len({found["weights"] for found in known.values()}) == 1, "initial weights differ"
        for arm, passes in PASSES.items():
            assert known[arm]["passes"] == passes, f"{arm}: {known[arm]['passes']} in place of {passes}"
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat in range(1 + config.rounds):
            for arm in arms:
                spent = call(microseconds, config, arm, n)
                if repeat:
                    times[arm].append(spent)
        row: dict[str, Any] = {"n": n, "microseconds": {arm: median(values) for arm, values in times.items()}}
        row["passes"] = {arm: found["passes"] for arm, found in known.items()}
        row["ours / theirs"] = ratio(times["ours"], times["theirs"])
        row["ours / theirs, from data"] = ratio(times["ours"], times["theirs, from data"])
        if not config.quick:
            best = row["their quickest"] = min(("theirs", *COMPILED[:3]), key=lambda arm: median(times[arm]))
            row["ours, compiled / their quickest"] = ratio(times["ours, compiled"], times[best])
        rows.append(row)
        print(f"n = {n}, microseconds per iteration (n points through the network forward, back):")
        for arm, value in row["microseconds"].items():
            passes = "   {:g}, {:g}".format(*row["passes"][arm]) if arm in row["passes"] else ""
            print(f"    {arm:28s} {value:8.0f}{passes}")
        print("   ", "; ".join(f"{name} {value:.2f}" for name, value in row.items() if "/" in name), flush=True)
    return rows


def time_table(config: Config, call: Callable[..., Any]) -> dict[str, Any]:
    """Seconds to the targets, for every arm at its best rate."""
    arms: dict[str, Any] = {}
    for arm in EAGER:
        tried = {lr: call(curve, config, arm, lr, 1000) for lr in config.grid}
        best = min(config.grid, key=lambda lr: badness(tried[lr], config))
        runs = [call(curve, config, arm, best, seed) for seed in range(config.seeds)]
        found = {f"{target:g}": [reached(points, target) for points in runs] for target in config.targets}
        arms[arm] = {
            "lr": best,
            "grid": {f"{lr:g}": summary(points, config) for lr, points in tried.items()},
            "reached": found,
            "seconds": {target: middle(points, "seconds") for target, points in found.items()},
            "updates": {target: middle(points, "updates") for target, points in found.items()},
            "curves": runs,
        }
        shown = (f"KL {kl} " + ("–" if s is None else f"{s:.2f}") for kl, s in arms[arm]["seconds"].items())
        print(f"    {arm:22s} lr {best:<6g} {'  '.join(f'{text:14s}' for text in shown)}", flush=True)
    return arms


def verdict(arms: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Our seconds over those of torchebm's best Langevin arm, by target; None where that did not get there."""
    found: dict[str, dict[str, float | None]] = {}
    for arm in ("ours", "ours, weighted"):
        found[arm] = {}
        for target, seconds in arms[arm]["seconds"].items():
            known = [s for peer in LANGEVIN if (s := arms[peer]["seconds"][target]) is not None]
            if seconds is not None:
                found[arm][target] = seconds / min(known) if known else None
                told = f"{seconds / min(known):.2f} of the time of" if known else "not reached within the budget by"
                print(f"    KL {target}: {arm}, {told} torchebm's better Langevin arm")
    return found


def summary(points: list[dict[str, float]], config: Config) -> dict[str, Any]:
    """Of a run of the grid."""
    met = {f"{target:g}": reached(points, target) for target in config.targets}
    seconds = {target: None if point is None else point["seconds"] for target, point in met.items()}
    return {"seconds": seconds, "last_kl": points[-1]["kl"]}


def badness(points: list[dict[str, float]], config: Config) -> tuple[float, ...]:
    """Orders rates: most targets met, then the hardest of these soonest, then the last KL."""
    met = [reached(points, target) for target in sorted(config.targets, reverse=True)]
    times = [point["seconds"] for point in met if point is not None]
    return (-len(times), times[-1] if times else math.inf, points[-1]["kl"])


def middle(points: list[dict[str, float] | None], key: str) -> float | None:
    """Geometric mean over seeds; None where one did not get there."""
    values = [point[key] for point in points if point is not None]
    return geometric_mean(values) if len(values) == len(points) else None


def main(config: Config) -> None:
    if DEVICE != "cpu":
        print("left out: a benchmark of the CPU; run it with CUDA_VISIBLE_DEVICES= (empty)")
        return
    config = config.effective()
    torch.set_num_threads(config.threads)
    parameters = sum(p.numel() for p in network(config, 0).parameters())
    found = machine() | {"parameters": parameters, "torchebm": version("torchebm"), "config": vars(config)}
    spawn = multiprocessing.get_context("spawn")  # a process per side: torchebm changes torch's global settings
    pools = {side: ProcessPoolExecutor(1, mp_context=spawn) for side in ("theirs", "ours")}

    def call(function: Callable[..., Any], config: Config, arm: str = "theirs", *args: Any) -> Any:
        """On the side of an arm; the other one waits."""
        return pools[arm.partition(",")[0]].submit(function, config, arm, *args).result()

    call(check_step, config)
    found["iterations"] = iteration_table(config, call)
    print(f"{config.law}, n = {config.particles}: seconds to an exact KL, geometric mean of {config.seeds} seeds")
    found["time_to_kl"] = time_table(config, call)
    found["seconds_ratio"] = verdict(found["time_to_kl"])
    for pool in pools.values():
        pool.shutdown()
    print("wrote", save("ebm-quick" if config.quick else "ebm", found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
