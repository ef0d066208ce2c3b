"""Where to put sensors: the single loop, prior contrastive estimation and chance, at equal likelihoods.

    python benchmarks/design.py                              # docs/figures/design.png, results/design-*.json
    python benchmarks/design.py --sources 2 --sensors 10     # results/design_of_2_sources-*.json

Sources z ~ N(0, I) in the plane are measured by sensors that see the logarithm of their summed intensity, 1/distance²
each, with noise (Foster et al., arXiv 2103.02438). Every seed begins with a random design. *loop* moves it by
`Single` on pairs, *bound* by the gradient of the contrastive lower bound with 19 contrasts; both with Adam, its rate on
a cosine. Every design is judged under the same noise, by the lower and the upper bound with many contrasts.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import FIGURES, machine, save
from torch import Tensor, nn

from implicit_diffusion import MALA, GaussianMixture, Noise, Single, Update
from implicit_diffusion.commands.shared.drawing import INK, finish_figure, sheet
from implicit_diffusion.design import (
    Gain,
    GaussianExperiment,
    InformationGain,
    PosteriorKernel,
    contrastive_bounds,
    information_gain,
)

ARMS = {"random": "#8a8f98", "bound": "#b9a44c", "loop": "#1f6f8b"}
CONTRASTS, PULLS = 19, 2  # of the bound; of MALA and Γ together, which evaluate two likelihoods each
STD = 0.5


@dataclass(frozen=True)
class Config:
    """The published setting."""

    seeds: int = 5
    sources: int = 1
    sensors: int = 5
    updates: int = 400
    likelihoods: int = 1000  # per update, of both methods
    lr: float = 0.05
    step_size: float = 0.02
    renewal: float = 0.05
    outcomes: int = 1500  # and contrasts of each, to judge a design by


class Sensors(nn.Module):
    """f(z; ξ) = log(0.1 + Σ_k 1/(10⁻⁴ + ‖z_k − ξ_j‖²)) at every sensor j."""

    def __init__(self, places: Tensor, sources: int) -> None:
        super().__init__()
        self.places, self.sources = nn.Parameter(places.clone()), sources

    def forward(self, z: Tensor) -> Tensor:
        apart = z.unflatten(1, (self.sources, 1, 2)) - self.places
        return torch.log(0.1 + (1 / (1e-4 + apart.square().sum(-1))).sum(1))


def begin(config: Config, noise: Noise) -> tuple[GaussianExperiment, Update]:
    sensors = Sensors(noise.normal((config.sensors, 2), 0), config.sources)
    experiment = GaussianExperiment(sensors, GaussianMixture(torch.zeros(1, 2 * config.sources)), std=STD)
    adam = torch.optim.Adam(sensors.parameters(), lr=config.lr)
    return experiment, Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.updates))


def by_loop(config: Config, noise: Noise) -> tuple[GaussianExperiment, list[Tensor]]:
    experiment, update = begin(config, noise)
    kernel = PosteriorKernel(MALA(config.step_size), experiment, config.renewal)
    pairs = config.likelihoods // (2 * PULLS)
    options: dict[str, Any] = {"particles": pairs, "noise": noise.stream(1)}
    loop = Single(experiment, kernel, InformationGain(experiment), update, **options)
    places = experiment.signal.places
    return experiment, [places.detach().clone(), *(places.detach().clone() for _ in loop.run(config.updates))]


def by_bound(config: Config, noise: Noise) -> GaussianExperiment:
    experiment, update = begin(config, noise)
    for k in range(config.updates):
        update.optimizer.zero_grad()
        outcomes = config.likelihoods // (CONTRASTS + 1)
        (-contrastive_bounds(experiment, noise.stream(2).stream(k), outcomes, CONTRASTS)[0].mean()).backward()
        update.optimizer.step()
        update.schedule.step()
    return experiment


def study(config: Config, seed: int) -> tuple[dict[str, Any], GaussianExperiment, list[Tensor]]:
    """One seed: the bounds of every arm's design, its gain over the random one, and seconds of the processor."""
    noise, began = Noise(seed), time.process_time()
    ours, path = by_loop(config, noise)
    seconds = {"loop": time.process_time() - began}
    began = time.process_time()
    designs = {"random": begin(config, noise)[0], "bound": by_bound(config, noise), "loop": ours}
    seconds["bound"] = time.process_time() - began
    judge = Noise(10_000)
    gains = {
        arm: information_gain(design, judge, outcomes=config.outcomes, contrasts=config.outcomes)
        for arm, design in designs.items()
    }
    row: dict[str, Any] = {"seed": seed, "seconds": seconds}
    for arm, gain in gains.items():
        row[arm] = {"lower": gain.lower.mean, "error": gain.lower.error, "upper": gain.upper.mean}
        row[arm] |= {"over_random": paired(gain, gains["random"]), "advice": gain.advice()}
    row["loop_over_bound"] = paired(gains["loop"], gains["bound"])
    return row, ours, path


def paired(gain: Gain, other: Gain) -> list[float]:
    return list(gain.over(other))


def run(config: Config) -> tuple[list[dict[str, Any]], GaussianExperiment, list[Tensor]]:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        row, *drawn = study(config, seed)
        if not rows:
            shown = drawn
        rows.append(row)
        line = ", ".join(f"{arm} {row[arm]['lower']:.2f} to {row[arm]['upper']:.2f}" for arm in ARMS)
        seconds = ", ".join(f"{arm} {s:.1f} s" for arm, s in row["seconds"].items())
        print(f"seed {seed}: {line} nats; {seconds}", flush=True)
    over = {arm: [row[arm]["over_random"][0] for row in rows] for arm in ("bound", "loop")}
    over["loop over bound"] = [row["loop_over_bound"][0] for row in rows]
    for name, values in over.items():
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        what = name if "over" in name else f"{name} over random"
        print(f"{what}: {mean(values):+.3f} ± {error:.3f} nats over {len(values)} seeds")
    name = "design" if config.sources == 1 else f"design_of_{config.sources}_sources"
    save(name, machine() | {"config": asdict(config), "rows": rows})
    return rows, *shown


def plot(
    rows: list[dict[str, Any]], experiment: GaussianExperiment, path: list[Tensor], noise: Noise, to: Path
) -> None:
    """The design's way over the prior, posteriors of one outcome at its ends, and the gains of all seeds."""
    figure = sheet(13.6, 3.7)
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.1])
    places, prior = torch.stack(path), experiment.prior_draws(1500, noise.stream(0))
    axes[0].scatter(*prior.T, s=4, color="#c3c8cf", label="prior")
    for j in range(places.shape[1]):
        axes[0].plot(*places[:, j].T, color=ARMS["loop"], lw=1.2, label="way of a sensor" if j == 0 else None)
    axes[0].scatter(*places[0].T, s=26, marker="s", color=ARMS["random"], label="at first", zorder=3)
    axes[0].scatter(*places[-1].T, s=30, marker="^", color=ARMS["loop"], label="in the end", zorder=3)
    axes[0].set(title="Sensors that the loop moves")
    axes[0].legend(loc="lower left", fontsize=8, frameon=True, edgecolor="none", framealpha=0.85)
    axis = torch.linspace(-3, 3, 161)
    grid = torch.cartesian_prod(axis, axis)
    truth, epsilon = torch.tensor([[0.9, -0.8]]), noise.normal((1, places.shape[1]), 1)
    for panel, where, title in ((axes[1], places[0], "at first"), (axes[2], places[-1], "in the end")):
        with torch.no_grad():
            experiment.signal.places.copy_(where)
            y = experiment.outcome(truth, epsilon)
            log_p = experiment.log_likelihood(y.expand(len(grid), -1), grid) - experiment.prior(grid)
        density = log_p.softmax(0).view(161, 161).T
        panel.contourf(axis, axis, density / density.max(), levels=[0.02, 0.1, 0.3, 0.6, 1.0], cmap="Blues")
        colour, marker = (ARMS["random"], "s") if title == "at first" else (ARMS["loop"], "^")
        panel.scatter(*where.T, s=26, marker=marker, color=colour)
        panel.scatter(*truth.T, marker="*", s=110, color="#c8553d", edgecolor=INK, lw=0.6, label="source", zorder=4)
        panel.set(title=f"A posterior, {title}")
        panel.legend(loc="lower left", fontsize=8)
    for panel in axes[:3]:
        panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
    for i, (arm, colour) in enumerate(ARMS.items()):
        x = [i + (k - (len(rows) - 1) / 2) * 0.09 for k in range(len(rows))]
        values, errors = ([row[arm][name] for row in rows] for name in ("lower", "error"))
        axes[3].errorbar(x, values, [2 * e for e in errors], fmt="o", ms=4, lw=1.2, capsize=2, color=colour)
        axes[3].hlines(mean(values), i - 0.33, i + 0.33, color=colour, lw=2)
    axes[3].set(title="Expected information gain", ylabel="nats ± 2 standard errors", xlim=(-0.6, 2.6))
    axes[3].set_xticks(range(len(ARMS)), ["random", "contrastive\nbound", "single loop"])
    finish_figure(figure, to, axes)


def main(config: Config) -> None:
    rows, experiment, path = run(config)
    if config.sources == 1:
        FIGURES.mkdir(parents=True, exist_ok=True)
        plot(rows, experiment, path, Noise(20_000), FIGURES / "design.png")
        print("wrote", FIGURES / "design.png")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
