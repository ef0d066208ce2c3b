"""Learn a distribution back: maximum likelihood of mixture weights in a single loop, against the exact KL.

    hexagon     data from the hexagon at θ_0, training from equal weights
    two-modes   modes at (±4, 0), data weights (.8, .2), training from (.5, .5): particles cannot cross

Each with unweighted and with weighted particles, at a constant rate and at one that decreases like 1/k: that of
Robbins and Monro, which averages over more and more of the particles' noise, and still covers any distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.recovery.config import TAIL, Config
from implicit_diffusion.commands.recovery.training import RecoveryRun, exact_kls, models, train
from implicit_diffusion.commands.shared.opening import study
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.commands.shared.summaries import to_json
from implicit_diffusion.processes import check_divides, main_only
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.study import Study

ARMS = ("unweighted", "weighted", "unweighted-decreasing", "weighted-decreasing")
LINES = 100  # of metrics.jsonl, for a run, at most


@dataclass(frozen=True)
class RecoveryArm:
    """One arm: means over its last updates.

    Args:
        kl: KL(data‖model), in nats, mean over seeds.
        kl_to_data: KL(model‖data), likewise.
        kl_range: the smallest and the largest KL(data‖model) of a seed.
    """

    kl: float
    kl_to_data: float
    kl_range: list[float]


@dataclass(frozen=True)
class Summary:
    """All arms, and the two divergences before training."""

    kl_before: float
    kl_to_data_before: float
    arms: dict[str, RecoveryArm]


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """All arms and seeds, summary, figure; returns what summary.json holds.

    Args:
        config: the options.
        directory: of an interrupted study to continue; None begins a new one.

    Raises:
        InvalidInputError: a number out of range, or an `out` with something in it.
    """
    config.check()
    check_divides("particles", config.particles)
    with study("recovery", config.resolved(), directory) as (config, directory):
        return _study(config, directory)


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figure again, and write and print the numbers, from the runs that are kept."""
    return _study(read_options(Config, directory), directory)


def run_of(config: Config, arm: str, seed: int) -> RecoveryRun:
    """One run of an arm."""
    assert config.step_size is not None  # resolved
    return RecoveryRun(
        problem=config.problem,
        weighted=arm.startswith("weighted"),
        decreasing=arm.endswith("decreasing"),
        steps=config.steps,
        particles=config.particles,
        step_size=config.step_size,
        lr=config.lr,
        seed=seed,
    )


def _study(config: Config, directory: RunDirectory) -> dict[str, Any]:
    """Make the runs that are missing, and summarise and draw all of them."""
    study = Study(directory, config.keep)
    curves: dict[str, Float[Tensor, "seeds updates 2"]] = {}
    with progress(len(ARMS) * config.seeds, "recovery") as bar:
        for name in ARMS:
            runs = []
            for seed in range(config.seed, config.seed + config.seeds):
                make = partial(train, run_of(config, name, seed))
                runs.append(study.once(name, seed, make=make, lines=partial(_lines, name, seed)))
                bar.update()
            curves[name] = torch.stack(runs)
    return _conclude(config, curves, directory)


@main_only
def _conclude(
    config: Config, curves: dict[str, Float[Tensor, "seeds updates 2"]], directory: RunDirectory
) -> dict[str, Any]:
    """Summary and figure; returns what summary.json holds."""
    target, start = models(config.problem)
    kl_before, kl_to_data_before = exact_kls(target, start.logits.detach()[None])[0].tolist()
    summary = Summary(kl_before, kl_to_data_before, {name: _summarise(runs) for name, runs in curves.items()})
    plot(curves, kl_before, directory.figure("kl"))
    written: dict[str, Any] = to_json(summary)
    directory.write_summary(written)  # the last file: with it, the run is finished
    show(summary, directory.path)
    return written


def _lines(arm: str, seed: int, kls: Float[Tensor, "updates 2"]) -> list[dict[str, Any]]:
    """About a hundred lines of metrics.jsonl for a run, the last update among them."""
    every = -(-len(kls) // LINES)
    return [
        {"arm": arm, "seed": seed, "updates": n + 1, "kl": kls[n, 0].item(), "kl_to_data": kls[n, 1].item()}
        for n in range((len(kls) - 1) % every, len(kls), every)
    ]


def _summarise(runs: Float[Tensor, "seeds updates 2"]) -> RecoveryArm:
    ends = runs[:, -TAIL:].mean(1)
    forward, reverse = ends.mean(0).tolist()
    return RecoveryArm(forward, reverse, [ends[:, 0].min().item(), ends[:, 0].max().item()])


def show(summary: Summary, folder: Path) -> None:
    """Print the arms, and the folder of the run."""
    print(f"exact KL(data‖model) and KL(model‖data), mean of the last {TAIL} updates (lowest – highest seed)")
    print(f"  {'before training':22s} {summary.kl_before:.4f}  {summary.kl_to_data_before:.4f}")
    for name, arm in summary.arms.items():
        low, high = arm.kl_range
        print(f"  {name:22s} {arm.kl:.2e}  {arm.kl_to_data:.2e}   ({low:.1e} – {high:.1e})")
    print(f"run       {folder}")


def plot(curves: dict[str, Float[Tensor, "seeds updates 2"]], before: float, path: Path) -> None:
    """Exact KL against updates, a band over seeds per arm."""
    from implicit_diffusion.commands.shared.drawing import UNWEIGHTED, WEIGHTED, finish_figure, legend_above, sheet

    figure = sheet(6.4, 4)
    axis = figure.subplots()
    for name, runs in curves.items():
        ys = runs[..., 0].clamp(min=1e-7)
        colour = WEIGHTED if name.startswith("weighted") else UNWEIGHTED
        style = "--" if name.endswith("decreasing") else "-"
        axis.plot(ys.log().mean(0).exp(), color=colour, ls=style, lw=1.5, label=name)
        if not name.endswith("decreasing"):
            axis.fill_between(range(ys.shape[1]), ys.amin(0), ys.amax(0), color=colour, alpha=0.15, lw=0)
    axis.axhline(before, color="0.5", ls=":", lw=1)
    axis.set(yscale="log", xlabel="updates", ylabel="exact KL(data‖model), nats", title="Geometric means over seeds")
    legend_above(axis, columns=2)
    finish_figure(figure, path, [axis])
