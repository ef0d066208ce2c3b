"""The numbers of a study of reward training, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from implicit_diffusion.commands.tilt.config import ARMS
from implicit_diffusion.commands.tilt.exact import AT_EDGE, Tradeoff, TrainedTradeoff
from implicit_diffusion.runs import RunDirectory


@dataclass(frozen=True)
class TiltArm(TrainedTradeoff):
    """Means over the seeds of one arm; `reward_std` is the reward's deviation over them, None for a single one."""

    reward_std: float | None


@dataclass(frozen=True)
class Row:
    """One weight: the optimum, and what the arms reached that were asked for."""

    kl_weight: float
    optimum: Tradeoff
    unweighted: TiltArm | None = None
    weighted: TiltArm | None = None

    @property
    def arms(self) -> dict[str, TiltArm]:
        """By name, those that there are."""
        arms = {name: getattr(self, name) for name in ARMS}
        return {name: arm for name, arm in arms.items() if arm is not None}


@dataclass(frozen=True)
class Summary:
    """The study.

    Args:
        reward_initial: E_π R before training.
        rows: one for every weight.
        frontier: KL to π_0 and reward of the optima of many weights, the largest first.
    """

    reward_initial: float
    rows: list[Row]
    frontier: list[tuple[float, float]]


def between(kl_weights: Sequence[float]) -> list[float]:
    """Weights for the frontier, from the smallest of these to four times the largest."""
    logs = torch.tensor(kl_weights).log()
    curve: list[float] = torch.linspace(logs.amax() + math.log(4), logs.amin(), 50).exp().tolist()
    return curve


def over_seeds(results: list[TrainedTradeoff]) -> TiltArm:
    """The summary of an arm."""
    rewards = [result.reward for result in results]
    return TiltArm(
        reward=mean(rewards),
        kl=mean(result.kl for result in results),
        objective=mean(result.objective for result in results),
        at_edge=mean(result.at_edge for result in results),
        reward_std=stdev(rewards) if len(rewards) > 1 else None,
    )


def show(summary: Summary, kept_arm: str, directory: RunDirectory) -> None:
    """Print rewards under the model beside the optimum.

    Args:
        summary: of the study.
        kept_arm: whose models are kept.
        directory: of the study.
    """
    print(f"expected reward under the model, by quadrature; {summary.reward_initial:.3f} before training")
    print(f"  {'w':>6s} {'optimum':>9s} " + " ".join(f"{arm:>18s}" for arm in summary.rows[0].arms))
    for row in summary.rows:
        cells = (
            f"{arm.reward:.3f}" + ("" if arm.reward_std is None else f" ± {arm.reward_std:.3f}")
            for arm in row.arms.values()
        )
        print(f"  {row.kl_weight:6g} {row.optimum.reward:9.3f} " + " ".join(f"{cell:>18s}" for cell in cells))
        for name, arm in row.arms.items():
            if arm.at_edge > AT_EDGE:
                print(f"         {name}: {arm.at_edge:.2g} of its mass is at the edge of the grid: not exact")
    print(f"models    {directory.model}/w-<weight>, {kept_arm}, of the first seed")
    print(f"run       {directory.path}")


def plot(summary: Summary, path: Path) -> None:
    """Reward against KL to π_0: the frontier of optima, and what the arms reach."""
    from implicit_diffusion.commands.shared.drawing import UNWEIGHTED, WEIGHTED, finish_figure, legend_above, sheet

    figure = sheet(5.6, 4)
    axis = figure.subplots()
    rows = summary.rows
    axis.plot(*zip(*summary.frontier), color="0.3", lw=1.2, label="optima of all w")
    optima = [(row.optimum.kl, row.optimum.reward) for row in rows]
    axis.plot(*zip(*optima), color="0.3", marker="x", ls="", label="optima of these w")
    colours = {"unweighted": UNWEIGHTED, "weighted": WEIGHTED}
    for name, marker in zip(rows[0].arms, "os"):
        arms = [row.arms[name] for row in rows]
        axis.errorbar(
            [arm.kl for arm in arms],
            [arm.reward for arm in arms],
            yerr=[arm.reward_std or 0.0 for arm in arms],
            fmt=marker,
            ms=7 if marker == "o" else 4,
            mfc="none",
            color=colours[name],
            label=f"{name}, ± deviation over seeds",
        )
    axis.set(xlabel="KL(π‖π_0), nats", ylabel="expected reward under the model")
    legend_above(axis, columns=2)
    finish_figure(figure, path, [axis])
