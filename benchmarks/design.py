"""Where to put sensors: single loops over pairs and pools, a contrastive bound, and chance, at equal likelihoods.

    python benchmarks/design.py                              # docs/figures/design.png, results/design-*.json
    python benchmarks/design.py --sources 2 --sensors 10     # results/design_of_2_sources-*.json

Sources z ~ N(0, I) in the plane are measured by sensors that see the logarithm of their summed intensity, 1/distance²
each, with noise (Foster et al., arXiv 2103.02438). Every seed begins with a random design. *bound* moves it by the
gradient of the contrastive lower bound with 19 contrasts, *loop* by `Single` on pairs, *pools of G* by `Single` on
samples of the pooled posterior of G outcomes; all with Adam, its rate on a cosine. Every design is judged under the
same noise, by the lower and the upper bound with many contrasts.

Before that, every estimator's noise at the first random design, which stands still: per update, and in the long run,
as the mean over many updates has it, where what updates have in common counts.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import FIGURES, machine, save
from torch import Tensor, nn

from implicit_diffusion import HMC, GaussianMixture, Noise, Single, Update
from implicit_diffusion.commands.shared.drawing import INK, finish_figure, sheet
from implicit_diffusion.design import (
    Gain,
    GaussianExperiment,
    InformationGain,
    Pool,
    PooledInformationGain,
    PosteriorKernel,
    contrastive_bounds,
    information_gain,
)

POOLS = {"pools of 2": (Pool(2, 5), 0.2), "pools of 10": (Pool(10, 16), 1.0)}  # with their renewal
COLOURS = {
    "random": "#8a8f98",
    "bound": "#b9a44c",
    "loop": "#1f6f8b",
    "pools of 2": "#8a5a83",
    "pools of 10": "#c8553d",
}
CONTRASTS = 19
STD = 0.5
HELD, BATCHES, SELDOM = 1000, 20, 0.02  # updates of a design that stands still, their batches, a small renewal


@dataclass(frozen=True)
class Config:
    """The published setting."""

    seeds: int = 5
    sources: int = 1
    sensors: int = 5
    updates: int = 400
    likelihoods: int = 1000  # per update, of all methods
    lr: float = 0.05
    step_size: float = 0.2  # of HMC
    leapfrogs: int = 2
    renewal: float = 0.2  # of pairs
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


def loop_of(config: Config, arm: str, experiment: GaussianExperiment, update: Any, noise: Noise) -> Single:
    """The single loop of an arm: over pairs, or over pools."""
    pool, renewal = POOLS.get(arm, (Pool(), config.renewal))
    hmc, pairs = HMC(config.step_size, config.leapfrogs), arm == "loop"
    kernel = PosteriorKernel(hmc, experiment, renewal, pool)
    each = 2 * (hmc.evaluations_per_step + pairs)  # of z and of z′: those of HMC serve Γ too, and pairs are exchanged
    objective = InformationGain(experiment) if pairs else PooledInformationGain(experiment, pool)
    n = config.likelihoods // each // pool.size * pool.size
    return Single(experiment, kernel, objective, update, particles=n, noise=noise)


def bounded(experiment: GaussianExperiment, noise: Noise, likelihoods: int, contrasts: int = CONTRASTS) -> Tensor:
    return contrastive_bounds(experiment, noise, likelihoods // (contrasts + 1), contrasts)[0].mean()


def optimised(config: Config, arm: str, noise: Noise) -> tuple[GaussianExperiment, list[Tensor]]:
    """The design that an arm ends with, and its way."""
    experiment, update = begin(config, noise)
    places = experiment.signal.places
    path = [places.detach().clone()]
    if arm != "bound":
        loop = loop_of(config, arm, experiment, update, noise.stream(1))
        return experiment, path + [places.detach().clone() for _ in loop.run(config.updates)]
    for k in range(config.updates):
        update.optimizer.zero_grad()
        (-bounded(experiment, noise.stream(2).stream(k), config.likelihoods)).backward()
        update.optimizer.step()
        update.schedule.step()
        path.append(places.detach().clone())
    return experiment, path


def held(config: Config, arm: str) -> tuple[Tensor, float | None]:
    """Gradients at the first random design, with shape (updates, sensors, 2); the effective share of pools."""
    experiment, _ = begin(config, Noise(0))
    places, noise = experiment.signal.places, Noise(30_000)
    still = torch.optim.SGD([places], lr=0.0)
    loop = None if arm == "bound" else loop_of(config, arm, experiment, still, noise)
    rows, shares = [], []
    for k in range(HELD + 50):
        if loop is None:
            gradient = torch.autograd.grad(bounded(experiment, noise.stream(k), config.likelihoods), places)[0]
        else:
            loop.step()
            gradient = -places.grad.clone()
            if arm in POOLS:
                with torch.no_grad():
                    shares.append(POOLS[arm][0].effective_share(experiment(loop.particles.x)).mean().item())
        rows.append(gradient)
    return torch.stack(rows[50:]), mean(shares) if shares else None


def noise_study(config: Config) -> dict[str, Any]:
    """Noise and share of every arm's gradient, in units of the gradient's norm, by a bound with many contrasts."""
    experiment, _ = begin(config, Noise(0))
    many = [bounded(experiment, Noise(40_000).stream(k), 400_000, 3999) for k in range(40)]
    exact = sum(torch.autograd.grad(value, experiment.signal.places)[0] for value in many) / len(many)
    found: dict[str, Any] = {}
    studied = [(arm, arm, config) for arm in list(COLOURS)[1:]]
    studied += [(f"loop, renewal {SELDOM:g}", "loop", replace(config, renewal=SELDOM))]
    for name, arm, varied in studied:
        rows, share = held(varied, arm)
        batches = rows.unflatten(0, (BATCHES, -1)).mean(1)
        scale = exact.norm()
        one, long = rows.var(0).sum().sqrt() / scale, (batches.var(0).sum() * (len(rows) / BATCHES)).sqrt() / scale
        of_gradient = (rows.mean(0) * exact).sum() / scale**2
        found[name] = {"noise": one.item(), "long_run": long.item(), "share": of_gradient.item(), "effective": share}
        print(
            f"{name}: noise {one:.2f} per update, {long:.2f} in the long run, {of_gradient:.2f} of the gradient"
            + (f", effective share {share:.3f}" if share else ""),
            flush=True,
        )
    return found


def study(config: Config, seed: int) -> tuple[dict[str, Any], GaussianExperiment, list[Tensor]]:
    """One seed: the bounds of every arm's design, its gain over the random one, and seconds of the processor."""
    noise, seconds, judge = Noise(seed), {}, Noise(10_000)
    designs, shown = {"random": begin(config, noise)[0]}, []
    for arm in list(COLOURS)[1:]:
        began = time.process_time()
        designs[arm], path = optimised(config, arm, noise)
        seconds[arm] = time.process_time() - began
        shown = path if arm == "loop" else shown
    gains = {
        arm: information_gain(design, judge, outcomes=config.outcomes, contrasts=config.outcomes)
        for arm, design in designs.items()
    }
    row: dict[str, Any] = {"seed": seed, "seconds": seconds}
    for arm, gain in gains.items():
        row[arm] = {"lower": gain.lower.mean, "error": gain.lower.error, "upper": gain.upper.mean}
        row[arm] |= {"over_random": paired(gain, gains["random"]), "over_bound": paired(gain, gains["bound"])}
        row[arm] |= {"advice": gain.advice()}
    return row, designs["loop"], shown


def paired(gain: Gain, other: Gain) -> list[float]:
    return list(gain.over(other))


def over_seeds(values: list[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{mean(values):+.3f} ± {error:.3f}"


def run(config: Config) -> tuple[list[dict[str, Any]], GaussianExperiment, list[Tensor]]:
    torch.set_num_threads(1)
    noise = noise_study(config) if config.sources == 1 else {}  # more sources need another reference
    rows: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        row, *drawn = study(config, seed)
        if not rows:
            shown = drawn
        rows.append(row)
        line = ", ".join(f"{arm} {row[arm]['lower']:.2f} to {row[arm]['upper']:.2f}" for arm in COLOURS)
        seconds = ", ".join(f"{arm} {s:.1f} s" for arm, s in row["seconds"].items())
        print(f"seed {seed}: {line} nats; {seconds}", flush=True)
    for arm in list(COLOURS)[1:]:
        over = (over_seeds([row[arm][other][0] for row in rows]) for other in ("over_random", "over_bound"))
        print("{}: {} nats over random, {} over bound".format(arm, *over))
    name = "design" if config.sources == 1 else f"design_of_{config.sources}_sources"
    save(name, machine() | {"config": asdict(config), "noise": noise, "rows": rows})
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
        axes[0].plot(*places[:, j].T, color=COLOURS["loop"], lw=1.2, label="way of a sensor" if j == 0 else None)
    axes[0].scatter(*places[0].T, s=26, marker="s", color=COLOURS["random"], label="at first", zorder=3)
    axes[0].scatter(*places[-1].T, s=30, marker="^", color=COLOURS["loop"], label="in the end", zorder=3)
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
        colour, marker = (COLOURS["random"], "s") if title == "at first" else (COLOURS["loop"], "^")
        panel.scatter(*where.T, s=26, marker=marker, color=colour)
        panel.scatter(*truth.T, marker="*", s=110, color="#c8553d", edgecolor=INK, lw=0.6, label="source", zorder=4)
        panel.set(title=f"A posterior, {title}")
        panel.legend(loc="lower left", fontsize=8)
    for panel in axes[:3]:
        panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
    for i, (arm, colour) in enumerate(COLOURS.items()):
        x = [i + (k - (len(rows) - 1) / 2) * 0.09 for k in range(len(rows))]
        values, errors = ([row[arm][name] for row in rows] for name in ("lower", "error"))
        axes[3].errorbar(x, values, [2 * e for e in errors], fmt="o", ms=4, lw=1.2, capsize=2, color=colour)
        axes[3].hlines(mean(values), i - 0.33, i + 0.33, color=colour, lw=2)
    axes[3].set(title="Expected information gain", ylabel="nats ± 2 standard errors", xlim=(-0.6, len(COLOURS) - 0.4))
    axes[3].set_xticks(range(len(COLOURS)), ["random", "contr.\nbound", "single\nloop", "pools\nof 2", "pools\nof 10"])
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
