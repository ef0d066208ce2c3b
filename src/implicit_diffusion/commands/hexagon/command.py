"""The paper's first experiment in all its arms: move the weights of six Gaussians towards a reward.

    untrained   Langevin dynamics on V(·; θ_0)
    implicit    one Langevin step and one step on θ per iteration (the single loop)
    weighted    the same with particles weighted for the motion of θ, begun at draws from π_θ0
    guidance    Langevin dynamics on V(·; θ_0) − λ R_smooth: no training
    transfer    Langevin dynamics on V(·; θ_opt), θ_opt from `implicit`: what training leaves behind
    nested      20 Langevin steps from X_0, then one step on θ
    unrolled    backpropagation through the last 5 Langevin steps

Arms that train get the same number of pulls through V at all particles. Nested and unrolled run with the same η as the
single loop, and again with the η of a published grid at which their final exact reward is best (`…_tuned`): over six
seeds of their own, and of rates that tie within the error the smallest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch

from implicit_diffusion.commands.hexagon.arms import ARMS, TRAINED, Arms, Config, Trace, logits_of
from implicit_diffusion.commands.hexagon.problem import LOGITS, Exact, mixture
from implicit_diffusion.commands.shared.inputs import inputs, record_inputs
from implicit_diffusion.commands.shared.studies import Study
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.runs.provenance import is_recorded


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """All arms and seeds, summary, figures; returns the summary.

    Args:
        config: see there.
        directory: of an interrupted study to go on with; None begins a new one.

    Raises:
        InvalidInputError: a number out of range, or an `out` with something in it.
    """
    config.check()
    begun = directory is not None
    out = directory.path if directory else config.out or dated("hexagon")
    directory = RunDirectory(out.absolute())
    config = replace(config.resolved(), out=directory.path)
    with directory.held():
        if not begun:
            directory.start(config)
        if not (begun and is_recorded(directory)):
            record_inputs(directory, config, inputs(config))
        with directory.resumable():
            return _study(config, Study(directory), directory)


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figures again, and write and print the numbers, from what was found."""
    values: dict[str, Any] = directory.read_config() or {}
    config = Config(**values | {"grid": tuple(values["grid"]), "out": directory.path})
    return _study(config, Study(directory), directory)


def _study(config: Config, study: Study, directory: RunDirectory) -> dict[str, Any]:
    """Run what is not found yet, and tell of all of it."""
    from implicit_diffusion.commands.hexagon.figures import draw

    exact, arms = Exact(config.sigma), Arms(config)
    names = [name for name in ARMS if not (config.forward_kl and name.startswith("unrolled"))]
    if len(names) < len(ARMS):
        print("unrolled: left out, since a forward KL has no derivative in the particles")
    grids: dict[str, dict[str, float]] = {}
    traces: list[Trace] = []

    def make(name: str, seed: int) -> dict[str, Any]:
        trace = arms.run(name, seed)
        describe(trace, exact)
        return trace.state_dict()

    def lines(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"arm": found["arm"], "seed": found["seed"]} | point for point in found["points"]]

    with progress(len(names) * config.seeds, "hexagon") as bar:
        for name in names:
            if name.endswith("_tuned"):
                arms.rates[name], grids[name] = study.once("tune", name, make=partial(arms.tune, name, exact))
            for seed in range(config.seed, config.seed + config.seeds):
                found = study.once(name, seed, make=partial(make, name, seed), lines=lines)
                traces.append(arms.trace(found))
                bar.update()
    summary = {
        "arms": {name: summarise([t for t in traces if t.arm == name], exact) for name in names},
        "grids": grids,
        "tuned": arms.rates,
        "reward_exact_initial": exact.reward(torch.tensor(LOGITS)),
        "reward_exact_best": exact.per_mode.max().item(),
        "advice": {t.arm: t.advice for t in traces if t.seed == config.seed and t.advice},
    }
    draw(config.sigma, traces, directory)
    directory.write_summary(summary)  # the last file: with it, the run is finished
    show(summary, directory)
    return summary


def describe(trace: Trace, exact: Exact) -> None:
    """Add to every record what is known exactly under its θ; guidance has no θ of its own."""
    initial = torch.tensor(LOGITS)
    for point in trace.points:
        logits = point.pop("logits")
        if trace.arm != "guidance":
            point["reward_exact"] = exact.reward(logits)
            point["kl_from_initial"] = exact.coarse.kl_of_weights(logits, initial) if trace.arm in TRAINED else None
            point["mode_probabilities"] = logits.softmax(0).tolist()


def summarise(traces: list[Trace], exact: Exact) -> dict[str, Any]:
    """One arm: means over its seeds."""
    rewards = [mean(t.tail) for t in traces]
    initial = mixture(None, exact.sigma, torch.float64)
    finals = [t.potential.double() for t in traces]
    arm: dict[str, Any] = {"reward": mean(rewards), "reward_std": stdev(rewards) if len(rewards) > 1 else None}
    if traces[0].arm != "guidance":
        arm["reward_exact"] = mean(exact.reward(logits_of(p)) for p in finals)
        modes = torch.stack([logits_of(p).detach().double().softmax(0) for p in finals])
    else:
        modes = torch.tensor([exact.coarse.modes(p) for p in finals], dtype=torch.float64)
    if traces[0].diagnostics:
        arm["diagnostics"] = traces[0].diagnostics
    return arm | {
        "mode_probabilities": modes.mean(0).tolist(),
        "kl_from_initial": mean(exact.coarse.kl(p, initial) for p in finals),
        "seconds": mean(t.seconds for t in traces),
        "gradient_evaluations": traces[0].points[-1]["gradient_evaluations"],
    }


def show(summary: dict[str, Any], directory: RunDirectory) -> None:
    """Print the arms as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title="Reward of the particles (last tenth, ± over seeds) and exactly under π_θ",
        caption=f"Exact at θ_0 {summary['reward_exact_initial']:.4f}, best possible "
        f"{summary['reward_exact_best']:.4f}. KL: to π_θ0. ∇V: pulls through V at all particles.",
    )
    for column in ("arm", "η", "reward", "±", "exact", "mode 2", "KL", "s", "∇V"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, arm in summary["arms"].items():
        table.add_row(
            name,
            f"{summary['tuned'][name]:g}" if name in summary["tuned"] else "",
            f"{arm['reward']:.4f}",
            "" if arm["reward_std"] is None else f"{arm['reward_std']:.4f}",
            f"{arm['reward_exact']:.4f}" if "reward_exact" in arm else "",
            f"{arm['mode_probabilities'][1]:.3f}",
            f"{arm['kl_from_initial']:.3f}",
            f"{arm['seconds']:.1f}",
            f"{arm['gradient_evaluations']:.0f}",
        )
    Console().print(table)
    for arm, lines in summary["advice"].items():
        for line in lines:
            print(f"{arm}: {line}")
    print(f"run       {directory.path}")
