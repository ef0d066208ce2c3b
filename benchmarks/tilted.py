"""Samples of the tilted law: what one costs with training and without, and from which gain on training pays.

    python benchmarks/tilted.py [--out runs/tilted]      # tables, and results/tilted-<processor>.json

Brightness on digits, N = 10, at the KL weights at which training gains about 0.5, 1 and 2 deviations, and the tilted
law a little more. For each of them `implicit-diffusion finetune` trains with its defaults; a finished run in the folder
is not repeated. Then the tilted law, with x_0 tilted, is drawn in three ways:

    trained, weighted       trajectories of the trained chain; a call of u_θ a row, and one of u_0 where it was trained
    pretrained, weighted    trajectories of the pretrained chain, one call a row: steering by importance
    pretrained, SMC         sequential Monte Carlo with look-ahead, one call a row

What counts is an effectively independent draw: m trajectories are worth n_eff = Var*(R)/Var(Ê) of them, where Ê is
their estimate of E* R. For weights w of mean one, Var(Ê) = E*[w (R − E* R)²]/m. For SMC it is the variance between
populations, so that the copies that resampling makes do not count. Averages over P* are by the trained chain's weights,
also of the pretrained chain's w = e^{R/β}/Z, of which its own trajectories rarely meet those that matter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from common import hardware, save
from rows import Problem, load

from digits import BETAS
from implicit_diffusion import Noise, evaluate
from implicit_diffusion.evaluation import Estimate, Evaluation, TiltedLaw, sequential_monte_carlo, tilted_law
from implicit_diffusion.evaluation.chains import mean_and_error

TRAINED, PRETRAINED, STEERED = "trained, weighted", "pretrained, weighted", "pretrained, SMC"


@dataclass(frozen=True)
class Config:
    """Where the runs are, and how many trajectories of each kind are drawn for a KL weight."""

    out: Path = Path("runs/tilted")
    trained: int = 6144
    pretrained: int = 32768
    particles: int = 256
    populations: int = 96
    seed: int = 11


@dataclass(frozen=True)
class Row:
    """One way to draw from the law.

    Args:
        method: its name.
        reward: E* R by it, and its standard error.
        reward_se: see there.
        trajectories: that were drawn.
        effective_share: n_eff as a share of them.
        effective_share_se: its standard error.
        kish_share: 1/(1 + Var w) of the weights at the end; None for SMC, where copies hide in it.
        evaluations_per_draw: network calls × samples for an effectively independent draw.
        pays_after: draws after which training and weighing is cheaper than this; None for the trained chain, and where
            it never is.
    """

    method: str
    reward: float
    reward_se: float
    trajectories: int
    effective_share: float
    effective_share_se: float
    kish_share: float | None
    evaluations_per_draw: float
    pays_after: float | None = None


def trained(beta: float, folder: Path) -> dict:
    """The summary of the run with this KL weight, made now or before."""
    if not (folder / "summary.json").exists():
        options = ["--kl-weight", str(beta), "--out", str(folder)]
        call = [sys.executable, "-m", "implicit_diffusion", "finetune", *options]
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(call, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return json.loads((folder / "summary.json").read_text())


def by_weights(name: str, drawn: TiltedLaw, inverse: Estimate, calls: int) -> Row:
    """The row of weighted trajectories, of which so many make one draw."""
    share = 1 / inverse.mean
    error = share**2 * inverse.error
    return Row(name, *drawn.reward, drawn.weights.numel(), share, error, drawn.effective_share, calls / share)


def steered(problem: Problem, config: Config, variance: float) -> Row:
    """The row of sequential Monte Carlo."""
    drawn = sequential_monte_carlo(
        problem.chain.pretrained(),
        problem.reward,
        problem.beta,
        Noise(config.seed).stream(3),
        particles=config.particles,
        populations=config.populations,
        start="tilted",
    )
    means = (drawn.law.weights * drawn.reward).mean(1)
    reward = mean_and_error(means)
    count = drawn.reward.numel()
    share = variance / reward.error**2 / count
    error = share * (2 / (config.populations - 1)) ** 0.5  # of the variance between so many populations
    return Row(STEERED, *reward, count, share, error, None, drawn.evaluations / count / share)


def rows_of(problem: Problem, config: Config, pretrained: Evaluation) -> list[Row]:
    """The three ways to draw from the law of one KL weight, whose pretrained trajectories are given."""
    chain, beta, noise = problem.chain, problem.beta, Noise(config.seed).stream(1)
    after = evaluate(chain, problem.reward, noise, starts=config.trained)
    law, steering = (tilted_law(each, beta, start="tilted") for each in (after, pretrained))
    squares = (after.reward.double() - law.reward.mean).square()
    variance = law.average(squares).mean
    untrained = (after.reward.double() / beta - law.log_normaliser.mean).exp()  # w of the pretrained chain
    inverse, other = (law.average(w * squares / variance) for w in (law.weights, untrained))
    return [
        by_weights(TRAINED, law, inverse, chain.num_steps + len(chain.trained_rows)),
        by_weights(PRETRAINED, steering, other, chain.num_steps),
        steered(problem, config, variance),
    ]


def main(config: Config) -> None:
    """Train what is missing, draw, print, write."""
    found, pretrained = [], None
    for gain, beta in BETAS.items():
        folder = config.out / f"beta-{beta}"
        summary = trained(beta, folder)
        problem = load(folder)
        if pretrained is None:
            noise = Noise(config.seed).stream(2)
            pretrained = evaluate(problem.chain.pretrained(), problem.reward, noise, starts=config.pretrained)
        best, *others = rows_of(problem, config, pretrained)
        for number, row in enumerate(others):
            saved = row.evaluations_per_draw - best.evaluations_per_draw
            after = summary["network_evaluations"] / saved if saved > 0 else None
            others[number] = replace(row, pays_after=after)
        before = mean_and_error(pretrained.reward)
        deviation = pretrained.reward.double().std().item()
        found.append(
            {
                "gain": gain,
                "kl_weight": beta,
                "gained": (best.reward - before.mean) / deviation,
                "training_evaluations": summary["network_evaluations"],
                "captured_without_weights": [summary["captured"], summary["captured_se"]],
                "rows": [asdict(row) for row in (best, *others)],
            }
        )
        show(found[-1])
    sizes = {name: value for name, value in vars(config).items() if name != "out"}
    print("wrote", save("tilted", hardware() | {"config": sizes, "laws": found}))


def show(law: dict) -> None:
    """Print the law's table."""
    cost = f"{law['training_evaluations']:,} network evaluations"
    print(f"\nβ = {law['kl_weight']}: a gain of {law['gained']:.2f} deviations; training took {cost}")
    print("| | E* R | effective share | evaluations per draw | training pays after |\n|---|---|---|---|---|")
    for row in law["rows"]:
        after = "never" if row["pays_after"] is None else f"{row['pays_after']:,.0f}"
        cells = [row["method"], f"{row['reward']:.3f} ± {row['reward_se']:.3f}"]
        cells += [f"{row['effective_share']:.2g} ± {row['effective_share_se']:.1g}"]
        cells += [f"{row['evaluations_per_draw']:.3g}", "" if row["method"] == TRAINED else after]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    import tyro

    torch.set_num_threads(1)
    main(tyro.cli(Config, description=__doc__))
