"""The paper's first experiment in all its arms: move the weights of six Gaussians towards a reward.

    untrained   Langevin dynamics on V(·; θ_0)
    implicit    one Langevin step and one step on θ per iteration (the single loop)
    weighted    the same with particles weighted for the motion of θ, begun at draws from π_θ0
    guidance    Langevin dynamics on V(·; θ_0) − λ R_smooth: no training
    transfer    Langevin dynamics on V(·; θ_opt), θ_opt from `implicit`: what training leaves behind
    nested      20 Langevin steps from X_0, then one step on θ
    unrolled    backpropagation through the last 5 Langevin steps

Arms that train get the same number of pulls through V at all particles. Nested and unrolled run with the same η as the
single loop, and where that is asked for again with the η of a published grid at which their final exact reward is best
(`…_tuned`): over six seeds of their own, and the smallest of the rates that tie within the error.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from implicit_diffusion.commands.hexagon.arms import ARMS, Arms
from implicit_diffusion.commands.hexagon.config import Config
from implicit_diffusion.commands.hexagon.summary import Summary, add_exact, show, summarise
from implicit_diffusion.commands.hexagon.trace import Trace
from implicit_diffusion.commands.shared.hexagon_problem import LOGITS, HexagonQuadrature, mixture
from implicit_diffusion.commands.shared.opening import study
from implicit_diffusion.commands.shared.pictures import PLOTTED, plane_pixels
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.commands.shared.summaries import to_json
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import check_divides, main_only
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.study import Study
from implicit_diffusion.runs.trackers.tracking import group_of


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """All arms and seeds, summary, figures; returns what summary.json holds.

    Args:
        config: the options.
        directory: of an interrupted study to continue; None begins a new one.

    Raises:
        InvalidInputError: a number out of range, or an `out` with something in it.
    """
    config.check()
    check_divides("particles", config.particles)
    with study("hexagon", config.resolved(), directory) as (config, directory):
        return _study(config, directory)


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figures again, and write and print the numbers, from the runs that are kept."""
    return _study(read_options(Config, directory), directory)


def _study(config: Config, directory: RunDirectory) -> dict[str, Any]:
    """Make the runs that are missing, and summarise and draw all of them."""
    study, exact, arms = Study(directory, config.keep), HexagonQuadrature(config.sigma), Arms(config.setting())
    asked = [name for name in ARMS if config.tune or not name.endswith("_tuned")]
    names = [name for name in asked if not (config.forward_kl and name.startswith("unrolled"))]
    if len(names) < len(asked):
        print("unrolled: left out, since a forward KL has no derivative in the particles")
    grids: dict[str, dict[str, float]] = {}
    traces: list[Trace] = []

    seeds = range(config.seed, config.seed + config.seeds)

    def make(name: str, missing: list[int]) -> list[dict[str, Any]]:
        made = arms.run(name, [seeds[i] for i in missing])
        for trace in made:
            add_exact(trace, exact)
        return [trace.state_dict() for trace in made]

    def lines(state: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"arm": state["arm"], "seed": state["seed"]} | point for point in state["points"]]

    with progress(len(names) * config.seeds, "hexagon") as bar:
        for name in names:
            if name.endswith("_tuned"):
                arms.rates[name], grids[name] = study.once("tune", name, make=partial(arms.tune, name, exact))
            keys = [(name, seed) for seed in seeds]
            for state in study.together(*keys, make=partial(make, name), lines=lines):
                traces.append(arms.restore(state))
                if traces[-1].seed == config.seed:
                    _show(traces[-1], config, directory)
                bar.update()
    rates = {name: rate for name, rate in arms.rates.items() if name in names}
    return _conclude(config, names, traces, grids, rates, directory)


@main_only
def _conclude(
    config: Config,
    names: list[str],
    traces: list[Trace],
    grids: dict[str, dict[str, float]],
    rates: dict[str, float],
    directory: RunDirectory,
) -> dict[str, Any]:
    """Summary and figures; returns what summary.json holds."""
    from implicit_diffusion.commands.hexagon.figures import draw

    exact = HexagonQuadrature(config.sigma)
    summary = Summary(
        arms={name: summarise([t for t in traces if t.arm == name], exact) for name in names},
        grids=grids,
        tuned=rates,
        reward_exact_initial=exact.reward(torch.tensor(LOGITS)),
        reward_exact_best=exact.per_mode.max().item(),
        advice={t.arm: t.advice for t in traces if t.seed == config.seed and t.advice},
    )
    draw(config.sigma, traces, directory)
    written: dict[str, Any] = to_json(summary)
    directory.write_summary(written)  # the last file: with it, the run is finished
    show(summary, directory.path)
    return written


def _show(trace: Trace, config: Config, directory: RunDirectory) -> None:
    """Show the particles at the end of a run to the trackers, beside draws of the initial law."""
    if directory.tracking.wanted:
        initial = mixture(None, config.sigma).sample(PLOTTED, Noise(config.seed))
        pixels = plane_pixels(trace.clouds[-1][0], beside=initial, words="draws of the initial law")
        group = group_of({"arm": trace.arm, "seed": trace.seed})
        directory.tracking.picture(trace.points[-1]["iteration"], "particles", pixels, group)
