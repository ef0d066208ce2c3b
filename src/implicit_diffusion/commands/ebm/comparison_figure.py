"""The picture of a comparison of all arms."""

from __future__ import annotations

import torch

from implicit_diffusion.commands.ebm.summary import CurvePoint
from implicit_diffusion.commands.shared.drawing import UNWEIGHTED, WEIGHTED, finish_figure, sheet
from implicit_diffusion.runs import RunDirectory

COLOURS = {"weighted": WEIGHTED, "hmc": "#7fb069", "implicit": UNWEIGHTED, "cd": "#c1666b", "pcd": "#e8a33d"}
NAMES = {
    "weighted": "weighted",
    "hmc": "the same, without weights",
    "implicit": "implicit (one Langevin step)",
    "cd": "CD-5",
    "pcd": "PCD-5",
}


def draw_comparison(name: str, curves: dict[str, list[list[CurvePoint]]], directory: RunDirectory) -> None:
    """figures/comparison.png: exact KL against pulls and seconds, and log Z against exact, with bands over seeds.

    Args:
        name: of the law.
        curves: by arm, one per seed.
        directory: of the comparison.
    """
    figure = sheet(12.5, 3.6)
    axes = figure.subplots(1, 3)
    for arm, runs in curves.items():
        whole = [run for run in runs if len(run) == max(map(len, runs))]
        if not whole:
            continue
        kl = torch.tensor([[p.kl for p in run] for run in whole])
        pulls = [[float(p.gradient_evaluations) for p in run] for run in whole]
        for axis, cost in zip(axes, (pulls, [[p.seconds for p in run] for run in whole])):
            x = torch.tensor(cost).mean(0)
            axis.plot(x, kl.log().mean(0).exp(), color=COLOURS[arm], marker=".", label=NAMES[arm])
            axis.fill_between(x, kl.amin(0), kl.amax(0), color=COLOURS[arm], alpha=0.15, lw=0)
    for axis, label in zip(axes, ("pulls through V at all particles", "seconds")):
        axis.set(xlabel=label, ylabel="exact KL(data‖model), nats", yscale="log")
    axes[0].set_title(f"{name}: geometric means and ranges over seeds", fontsize=10)
    if any(curves.values()):
        axes[0].legend(frameon=False, fontsize=8)
    weighted = [run for run in curves.get("weighted", []) if run]
    if weighted:
        difference = torch.tensor([[(p.log_z_particles or 0.0) - p.log_z for p in run] for run in weighted])
        updates = [p.updates for p in weighted[0]]
        axes[2].axhline(0, color="0.5", lw=1)
        axes[2].plot(updates, difference.mean(0), color=COLOURS["weighted"], label="training's own weights")
        axes[2].fill_between(
            updates, difference.amin(0), difference.amax(0), color=COLOURS["weighted"], alpha=0.15, lw=0
        )
        ends = [
            (p.log_z_estimate - p.log_z, 2 * p.log_z_estimate_se)
            for p in (run[-1] for run in weighted)
            if p.log_z_estimate is not None and p.log_z_estimate_se is not None
        ]
        places = updates[-1] * (1.02 + 0.015 * torch.arange(len(ends)))
        axes[2].errorbar(
            places,
            [d for d, _ in ends],
            yerr=[e for _, e in ends],
            fmt=".",
            color=COLOURS["cd"],
            label="annealing, ± 2 s.e.",
        )
        axes[2].set(xlabel="updates", ylabel="estimate of log Z − exact")
        axes[2].legend(frameon=False, fontsize=8)
    finish_figure(figure, directory.figure("comparison"), axes)
