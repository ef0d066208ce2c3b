"""Energy-based models at equal seconds: weighted particles from the Gaussian on, or after a start by score matching.

    python benchmarks/starts.py            # docs/figures/starts.png, results/starts-*.json

    circles, eight-gaussians    laws of the plane, a perceptron. KL(data‖model) by quadrature.
    digits                      8 × 8 digits, a convolutional network. Held-out −log p, log Z by annealing.

*gaussian* trains by maximum likelihood from the first second on, and draws its particles afresh once, by annealing at
half of the time. *score matching* spends a quarter of the time without particles, draws them by the same annealing, and
trains by maximum likelihood for the rest. The rate of Adam decays along a cosine over the time of each stage. Seconds
are processor time of this process, on one thread, for steps and annealing: time that other processes take does not
count, but they slow down memory and caches, so that fewer updates fit into a second on a busy machine. The arms take
turns, seed by seed. `--problems digits` measures that one anew, and keeps what the file has of the others.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import FIGURES, RESULTS, machine, save

from implicit_diffusion import HMC, ForwardKL, Noise, Single
from implicit_diffusion.commands.ebm.data import Data, load_data
from implicit_diffusion.commands.shared.drawing import finish_figure, sheet
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.loops import ScoreMatching
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.potentials import Tilted, conv, mlp
from implicit_diffusion.samplers import annealed

ARMS = {"gaussian": "#8a8f98", "score matching": "#1f6f8b"}
SHARE = 0.25  # of the time, for score matching
ANNEALING = 50  # steps that draw particles afresh
NETWORK, SCORES, TRAIN, ANNEAL, JUDGE = range(1, 6)  # streams of noise beside the data's


@dataclass(frozen=True)
class Config:
    """The published setting."""

    seeds: int = 5
    problems: tuple[str, ...] = ("circles", "eight-gaussians", "digits")


@dataclass(frozen=True)
class Problem:
    """A problem, with the settings of its arms.

    Args:
        kernel: of the particles.
        particles: n, and data per update.
        noise_std: σ of score matching.
        budgets: processor seconds of a run.
        rates: of Adam at the start of a stage.
        reported: what is judged, lower is better.
    """

    kernel: HMC
    particles: int
    noise_std: float
    budgets: tuple[float, ...]
    rates: tuple[float, ...]
    reported: str


PROBLEMS = {
    "circles": Problem(HMC(0.06, 4), 1000, 0.1, (2.0, 6.0), (3e-3, 1e-2), "KL(data‖model) (nats)"),
    "eight-gaussians": Problem(HMC(0.06, 4), 1000, 0.1, (2.0,), (1e-2,), "KL(data‖model) (nats)"),
    "digits": Problem(HMC(0.2, 4), 256, 0.3, (10.0,), (3e-3,), "held-out −log p (nats)"),
}


def network(data: Data, noise: Noise) -> Tilted:
    """N(0, I) plus a network of zeros."""
    shape = data.event_shape
    return Tilted(conv(shape, noise, width=8) if len(shape) == 3 else mlp(*shape, noise, width=64), shape)


def judged(potential: Tilted, data: Data, noise: Noise) -> float:
    if data.law is not None:
        return Quadrature(data.shift, data.scale, data.law).exact_fit(potential).kl
    log_z, _ = annealed(potential.tempered, HMC(0.2, 4), 160, noise, steps=100).log_z(potential)
    with torch.no_grad():
        energy = potential(data.standardised()[1]).double().mean().item()
    return energy + log_z + data.scale.double().expand(data.event_shape).log().sum().item()


class Stopwatch:
    """Processor seconds of this process inside of its blocks."""

    def __init__(self) -> None:
        self.spent = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.spent += time.process_time() - began


def until(
    end: float, watch: Stopwatch, loop: Loop, optimizer: torch.optim.Optimizer, rate: float, whole: tuple[float, float]
) -> None:
    """Step until the watch shows `end`; the rate follows a cosine over the stage `whole`, from its begin to its end."""
    while watch.spent < end:
        share = (watch.spent - whole[0]) / (whole[1] - whole[0])
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
        with watch.running():
            loop.step()


def train(arm: str, name: str, budget: float, rate: float, seed: int) -> dict[str, Any]:
    """One run; `value` is None where it overflowed."""
    problem, noise, watch = PROBLEMS[name], Noise(seed), Stopwatch()
    data = load_data(name, noise.stream(0))
    train, n = data.standardised()[0], problem.particles
    potential = network(data, noise.stream(NETWORK))

    def adam() -> torch.optim.Optimizer:
        return torch.optim.Adam(potential.parameters(), lr=rate, betas=(0.9, 0.99))

    optimizer, row = adam(), {"seed": seed, "value": None}
    loop = Single(
        potential,
        problem.kernel,
        ForwardKL(train, batch=n),
        optimizer,
        particles=n,
        noise=noise.stream(TRAIN),
        weighted=True,
    )

    def redraw() -> None:
        with watch.running():
            particles = annealed(
                potential.tempered, problem.kernel, n, noise.stream(ANNEAL), steps=ANNEALING
            ).particles(potential)
            loop.refresh(particles)
        row["annealed_ess"] = round(particles.ess.item() / n, 4)

    try:
        if arm == "gaussian":
            stage = 0.0, budget
            until(budget / 2, watch, loop, optimizer, rate, stage)
        else:
            stage, scores = (0.0, SHARE * budget), adam()
            start = ScoreMatching(
                potential, train, scores, noise_std=problem.noise_std, noise=noise.stream(SCORES), batch=n
            )
            until(stage[1], watch, start, scores, rate, stage)
            row |= {"start_updates": start.update.updates, "start_value": judged(potential, data, noise.stream(JUDGE))}
            stage = stage[1], budget
        redraw()
        until(budget, watch, loop, optimizer, rate, stage)
        value = judged(potential, data, noise.stream(JUDGE))
        row["value"] = value if math.isfinite(value) else None
    except NonFiniteError as error:
        row["lost"] = str(error)
    return row | {"updates": loop.update.updates, "seconds": round(watch.spent, 3)}


def run(config: Config) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    about, rows = machine() | {"share": SHARE, "annealing": ANNEALING}, []
    if (path := RESULTS / "starts-cpu.json").exists():
        rows = [row for row in json.loads(path.read_text())["rows"] if row["problem"] not in config.problems]
    for name in config.problems:
        problem = PROBLEMS[name]
        for budget in problem.budgets:
            for rate in problem.rates:
                runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
                for seed in range(config.seeds):
                    for arm in ARMS:  # in turn
                        runs[arm].append(train(arm, name, budget, rate, seed))
                for arm in ARMS:
                    row = {"problem": name, "budget": budget, "rate": rate, "arm": arm, "reported": problem.reported}
                    rows.append(row | summary(runs[arm], runs["gaussian"]))
                    print(line(rows[-1]), flush=True)
                save("starts", about | {"rows": rows})
    return rows


def summary(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with their errors, alone and seed by seed less the others."""
    pairs = [(r["value"], o["value"]) for r, o in zip(runs, others, strict=True)]
    values = [value for value, _ in pairs if value is not None]
    apart = [value - other for value, other in pairs if value is not None and other is not None]
    starts = [r["start_value"] for r in runs if "start_value" in r]
    row: dict[str, Any] = {"lost": len(runs) - len(values), "start": mean(starts) if starts else None}
    for key, numbers in (("value", values), ("less_gaussian", apart)):
        row[key] = mean(numbers) if numbers else None
        row[f"{key}_se"] = stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return row | {"runs": runs}


def line(row: dict[str, Any]) -> str:
    """One row, for people."""

    def shown(key: str) -> str:
        value, error = row[key], row[f"{key}_se"]
        return "-" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")

    less = f", less gaussian {shown('less_gaussian')}" if row["arm"] != "gaussian" else ""
    start = "" if row["start"] is None else f", after the start {row['start']:.4g}"
    updates = f"{mean(r['updates'] for r in row['runs']):.0f} updates, {row['lost']} lost"
    where = f"{row['problem']:15} {row['budget']:4g} s η {row['rate']:<6g} {row['arm']:14}"
    return f"{where} {shown('value')}{less}{start}; {updates}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed as a point and the means with two standard errors, for each budget and rate."""
    names = [name for name in PROBLEMS if any(row["problem"] == name for row in rows)]
    figure = sheet(4.0 * len(names), 3.6)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names):
        own = [row for row in rows if row["problem"] == name]
        settings = list(dict.fromkeys((row["budget"], row["rate"]) for row in own))
        for side, (arm, colour) in zip((-0.13, 0.13), ARMS.items()):
            for row in (row for row in own if row["arm"] == arm):
                x = settings.index((row["budget"], row["rate"])) + side
                values = [r["value"] for r in row["runs"] if r["value"] is not None]
                axis.plot([x + 0.06] * len(values), values, ".", color=colour, alpha=0.4, ms=5)
                label = arm if x == side else None
                error = 2 * (row["value_se"] or 0.0)
                axis.errorbar(x, row["value"], error, fmt="o", color=colour, ms=4, capsize=3, label=label)
        labels = [f"{budget:g} s\nη {rate:g}" for budget, rate in settings]
        axis.set_xticks(range(len(settings)), labels)
        axis.set_xlim(-0.5, len(settings) - 0.5)
        axis.set(title=name, ylabel=own[0]["reported"], xlabel="processor time, rate of Adam")
        if name != "digits":
            axis.set_yscale("log")
    axes[0].legend(frameon=False)
    finish_figure(figure, path, axes)


def main(config: Config) -> None:
    rows = run(config)
    FIGURES.mkdir(parents=True, exist_ok=True)
    plot(rows, FIGURES / "starts.png")
    print("wrote", FIGURES / "starts.png")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
