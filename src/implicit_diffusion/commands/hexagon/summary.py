"""The numbers of the hexagon, arm by arm, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from implicit_diffusion.commands.hexagon.arms import TRAINED
from implicit_diffusion.commands.hexagon.trace import Trace, logits_of
from implicit_diffusion.commands.shared.hexagon_problem import LOGITS, HexagonQuadrature, mixture
from implicit_diffusion.extras import require


@dataclass(frozen=True)
class HexagonArm:
    """One arm: means over its seeds.

    Args:
        reward: of the particles, over the last tenth of the iterations.
        reward_std: its deviation over seeds; None for a single one.
        mode_probabilities: mass of each mode under the final potential.
        kl_from_initial: KL of its law to π_θ0, in nats.
        seconds: of a run.
        gradient_evaluations: pulls through V at all particles.
        reward_exact: E R_hard under π_θ; None for guidance, which has no θ of its own.
        diagnostics: of the first seed; None for arms that do not train.
    """

    reward: float
    reward_std: float | None
    mode_probabilities: list[float]
    kl_from_initial: float
    seconds: float
    gradient_evaluations: float
    reward_exact: float | None = None
    diagnostics: dict[str, float] | None = None


@dataclass(frozen=True)
class Summary:
    """All arms.

    Args:
        arms: by name.
        grids: mean final exact reward by η, for each arm that is tuned.
        tuned: η of every arm that trains.
        reward_exact_initial: E R_hard under π_θ0.
        reward_exact_best: the largest that any θ has.
        advice: what the diagnostics of the first seed say, by arm.
    """

    arms: dict[str, HexagonArm]
    grids: dict[str, dict[str, float]]
    tuned: dict[str, float]
    reward_exact_initial: float
    reward_exact_best: float
    advice: dict[str, list[str]]


def add_exact(trace: Trace, exact: HexagonQuadrature) -> None:
    """Add to every record what is known exactly under its θ; guidance has no θ of its own."""
    if trace.arm == "guidance":
        return
    initial = torch.tensor(LOGITS)
    for point, logits in zip(trace.points, trace.path, strict=True):
        point["reward_exact"] = exact.reward(logits)
        point["kl_from_initial"] = exact.coarse.kl_of_weights(logits, initial) if trace.arm in TRAINED else None
        point["mode_probabilities"] = logits.softmax(0).tolist()


def summarise(traces: list[Trace], exact: HexagonQuadrature) -> HexagonArm:
    """One arm, from the runs of all its seeds."""
    rewards = [mean(t.tail) for t in traces]
    initial = mixture(None, exact.sigma, torch.float64)
    finals = [t.potential.double() for t in traces]
    guided = traces[0].arm == "guidance"
    if guided:
        modes = torch.tensor([exact.coarse.modes(p) for p in finals], dtype=torch.float64)
    else:
        modes = torch.stack([logits_of(p).detach().double().softmax(0) for p in finals])
    return HexagonArm(
        reward=mean(rewards),
        reward_std=stdev(rewards) if len(rewards) > 1 else None,
        reward_exact=None if guided else mean(exact.reward(logits_of(p)) for p in finals),
        diagnostics=traces[0].diagnostics or None,
        mode_probabilities=modes.mean(0).tolist(),
        kl_from_initial=mean(exact.coarse.kl(p, initial) for p in finals),
        seconds=mean(t.seconds for t in traces),
        gradient_evaluations=traces[0].points[-1]["gradient_evaluations"],
    )


def show(summary: Summary, folder: Path) -> None:
    """Print the arms as a table, and the folder of the run."""
    require("rich")
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title="Reward of the particles (last tenth, ± over seeds) and exactly under π_θ",
        caption=f"Exact at θ_0 {summary.reward_exact_initial:.4f}, best possible "
        f"{summary.reward_exact_best:.4f}. KL: to π_θ0. ∇V: pulls through V at all particles.",
    )
    for column in ("arm", "η", "reward", "±", "exact", "mode 2", "KL", "s", "∇V"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for name, arm in summary.arms.items():
        table.add_row(
            name,
            f"{summary.tuned[name]:g}" if name in summary.tuned else "",
            f"{arm.reward:.4f}",
            "" if arm.reward_std is None else f"{arm.reward_std:.4f}",
            "" if arm.reward_exact is None else f"{arm.reward_exact:.4f}",
            f"{arm.mode_probabilities[1]:.3f}",
            f"{arm.kl_from_initial:.3f}",
            f"{arm.seconds:.1f}",
            f"{arm.gradient_evaluations:.0f}",
        )
    Console().print(table)
    for arm_name, lines in summary.advice.items():
        for line in lines:
            print(f"{arm_name}: {line}")
    print(f"run       {folder}")
