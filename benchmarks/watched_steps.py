"""Steps that watch the weights (`Single(min_ess=…)`): what they save, and what they cost, over learning rates.

    python benchmarks/watched_steps.py            # docs/figures/watched_steps.png, results/watched_steps-*.json

Problems of weighted single-loop training, each with the best that its objective can reach known:

    modes      Gaussians at ±2 in one dimension that learn data at ±3 with masses (0.8, 0.2): means and log-weights, by
               maximum likelihood. Exact KL(data‖model) by quadrature. Deviation 1, and 0.3: no particle crosses.
    circles    a tilt f of two rings by a network, reward for the right half plane, KL weight 0.2. The optimum is known,
               and what is reported is F(π_θ) − F* = 0.2 KL(π_θ‖π*), by quadrature.
    digits     an energy-based model of 8 × 8 digits. Held-out negative log-likelihood, log Z by annealing.

Every arm gets the same number of pulls through V at all particles. *plain* is the single loop, *weighted* has weights,
*watched* also `min_ess=0.3`, *nested* makes some steps of the kernel per update, from where the last ones ended. Adam,
at constant rates. With HMC the checks of *watched* evaluate V without gradients, which counts as time, but as no pull.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import FIGURES, machine, save
from torch import Tensor, nn

from implicit_diffusion import HMC, ULA, ForwardKL, GaussianMixture, Noise, ReverseKL, Reward, Single
from implicit_diffusion.commands.ebm.data import load_data
from implicit_diffusion.commands.shared.drawing import finish_figure, sheet
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.loops import NestedParticles
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.objectives import Objective
from implicit_diffusion.potentials import Tilted, conv, mlp
from implicit_diffusion.samplers import annealed
from implicit_diffusion.samplers.kernel import Kernel

ARMS = ("plain", "weighted", "watched", "nested")
COLOURS = {"plain": "#8a8f98", "weighted": "#1f6f8b", "watched": "#c8553d", "nested": "#b9a44c"}
MIN_ESS = 0.3


@dataclass(frozen=True)
class Config:
    """The published setting."""

    seeds: int = 5
    problems: tuple[str, ...] = ("modes", "narrow modes", "circles", "digits")


@dataclass(frozen=True)
class Built:
    """One run's parts.

    Args:
        potential: V.
        objective: F.
        judge: what is reported at the end, lower is better.
    """

    potential: nn.Module
    objective: Objective
    judge: Callable[[], float]


@dataclass(frozen=True)
class Problem:
    """A problem, with the settings of its arms.

    Args:
        build: from the seed.
        kernel: of the particles.
        particles: n.
        pulls: through V at all particles, of every arm.
        rates: of Adam.
        inner_steps: of the nested arm.
        reported: what `judge` returns.
    """

    build: Callable[[int], Built]
    kernel: Kernel
    particles: int
    pulls: int
    rates: tuple[float, ...]
    inner_steps: int
    reported: str


def modes(std: float) -> Callable[[int], Built]:
    grid = torch.arange(-10, 10, 0.002, dtype=torch.float64)[:, None]

    def build(seed: int) -> Built:
        target = GaussianMixture(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.8, 0.2]).log(), std).double()
        data = target.sample(2000, Noise(seed).stream(0)).float()
        model = GaussianMixture(torch.tensor([[-2.0], [2.0]]), std=std)

        @torch.no_grad()
        def kl() -> float:
            log_p = -target(grid) - target.log_z
            log_q = -model.double()(grid) - model.log_z
            return (log_p.exp() @ (log_p - log_q)).item() * 0.002

        return Built(model, ForwardKL(data, batch=500), kl)

    return build


class Rings(nn.Module):
    """−log Σ_r e^{−(‖x‖ − r)²/2σ²}, r = 1 and 1/2 and σ = 0.08 as in the data called circles, plus a network."""

    STD = 0.08

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.rings(x.square().sum(1).sqrt()) + self.network(x)[:, 0]

    def rings(self, radius: Tensor) -> Tensor:
        apart = radius[:, None] - torch.tensor([1.0, 0.5], dtype=radius.dtype)
        return -torch.logsumexp(-apart.square() / (2 * self.STD**2), 1)

    def sample(self, n: int, noise: Noise) -> Tensor:
        """Draws while the network is zero: the radius from the inverse of its cumulative distribution."""
        radii = torch.linspace(1e-4, 2, 20_001, dtype=torch.float64)
        cumulative = (radii * (-self.rings(radii)).exp()).cumsum(0)
        u, angle = torch.rand((2, n), generator=noise.generator(0), dtype=torch.float64)
        radius = radii[torch.searchsorted(cumulative, u * cumulative[-1]).clamp(max=len(radii) - 1)]
        return (radius * torch.stack([(math.tau * angle).cos(), (math.tau * angle).sin()])).T.float()


KL_WEIGHT = 0.2


def half_plane(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).to(x)


def circles(seed: int) -> Built:
    model = Rings(mlp(2, Noise(seed).stream(0), width=32, depth=2))
    initial = Rings(mlp(2, Noise(seed).stream(0), width=32, depth=2))
    axis = torch.arange(-1.6, 1.6, 0.01) + 0.005
    grid = torch.cartesian_prod(axis, axis)

    @torch.no_grad()
    def regret() -> float:
        log_p = (-model(grid)).double().log_softmax(0)
        best = (half_plane(grid) / KL_WEIGHT - initial(grid)).double().log_softmax(0)
        return KL_WEIGHT * (log_p.exp() @ (log_p - best)).item()

    return Built(model, Reward(half_plane) + KL_WEIGHT * ReverseKL.to_initial(model), regret)


def digits(seed: int) -> Built:
    noise = Noise(seed)
    data = load_data("digits", noise.stream(0))
    train, held_out = data.standardised()
    model = Tilted(conv(data.event_shape, noise.stream(1), width=8), data.event_shape)

    def nll() -> float:
        log_z, _ = annealed(model.tempered, HMC(0.2, 4), 160, noise.stream(2), steps=60).log_z(model)
        with torch.no_grad():
            return model(held_out).double().mean().item() + log_z + data.scale.double().log().sum().item()

    return Built(model, ForwardKL(train, batch=256), nll)


PROBLEMS = {
    "modes": Problem(modes(1.0), ULA(0.2), 500, 600, (0.1, 0.3, 1.0), 5, "KL(data‖model)"),
    "narrow modes": Problem(modes(0.3), ULA(0.018), 500, 600, (0.03, 0.1, 0.3), 5, "KL(data‖model)"),
    "circles": Problem(circles, ULA(0.0013), 500, 600, (3e-3, 1e-2, 3e-2), 5, "F(π_θ) − F*"),
    "digits": Problem(digits, HMC(0.2, 4), 256, 480, (3e-3, 1e-2), 3, "held-out −log p (nats)"),
}


def make_loop(arm: str, problem: Problem, built: Built, rate: float, seed: int) -> ParticleLoop:
    optimizer = torch.optim.Adam(built.potential.parameters(), lr=rate, betas=(0.9, 0.99))
    parts = built.potential, problem.kernel, built.objective, optimizer
    more = {"particles": problem.particles, "noise": Noise(seed).stream(3)}
    if arm == "nested":
        return NestedParticles(*parts, **more, inner_steps=problem.inner_steps, begin="last")
    rule = {"min_ess": MIN_ESS} if arm == "watched" else {}
    return Single(*parts, **more, weighted=arm != "plain", **rule)


def train(arm: str, problem: Problem, rate: float, seed: int) -> dict[str, Any]:
    """One run to the end of its pulls; `value` is None where it overflowed."""
    built = problem.build(seed)
    loop = make_loop(arm, problem, built, rate, seed)
    ess, shares, began = [1.0], [1.0], time.process_time()
    value: float | None = None
    try:
        while loop.gradient_evaluations < problem.pulls:
            metrics = loop.step()
            ess.append(float(metrics.get("ess", loop.n)) / loop.n)
            shares.append(metrics.get("step_share", 1.0))
        seconds = time.process_time() - began
        value = built.judge()
    except NonFiniteError:
        seconds = time.process_time() - began
    return {
        "value": value if value is not None and math.isfinite(value) else None,
        "updates": loop.update.updates,
        "seconds": round(seconds, 2),
        "least_ess": min(ess),
        "shortened": mean(share < 1 for share in shares[1:]) if len(shares) > 1 else 0.0,
    }


def run(config: Config) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for name in config.problems:
        problem = PROBLEMS[name]
        for rate in problem.rates:
            for arm in ARMS:
                runs = [train(arm, problem, rate, seed) for seed in range(config.seeds)]
                values = [run["value"] for run in runs if run["value"] is not None]
                row = {"problem": name, "rate": rate, "arm": arm, "reported": problem.reported, "lost": 0, "runs": runs}
                row["lost"] = len(runs) - len(values)
                row["mean"] = mean(values) if values else None
                row["error"] = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
                rows.append(row)
                print(line(row), flush=True)
        save("watched_steps", machine() | {"min_ess": MIN_ESS, "rows": rows})
    return rows


def line(row: dict[str, Any]) -> str:
    """One row, for people."""
    runs, value = row["runs"], "lost" if row["mean"] is None else f"{row['mean']:.4g}"
    error = "" if row["error"] is None else f" ± {row['error']:.2g}"
    lost = f", {row['lost']} of {len(runs)} lost" if row["lost"] else ""
    own = f"least ESS/n {min(r['least_ess'] for r in runs):.3f}, shortened {mean(r['shortened'] for r in runs):.1%}"
    cost = f"{mean(r['updates'] for r in runs):.0f} updates, {mean(r['seconds'] for r in runs):.1f} s"
    return f"{row['problem']:12} η {row['rate']:<6g} {row['arm']:9} {value}{error}{lost}; {own}; {cost}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """What is left of every problem against the learning rate, with two standard errors."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure = sheet(3.4 * len(names), 3.6)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names):
        for arm in ARMS:
            own = [row for row in rows if row["problem"] == name and row["arm"] == arm and row["mean"] is not None]
            rates, values = [row["rate"] for row in own], [row["mean"] for row in own]
            errors = [min(2 * (row["error"] or 0.0), 0.9 * abs(row["mean"])) for row in own]
            style = {"color": COLOURS[arm], "marker": "o", "ms": 4, "lw": 1.6, "capsize": 3, "label": arm}
            axis.errorbar(rates, values, errors, **style)
        reported = next(row["reported"] for row in rows if row["problem"] == name)
        axis.set(xscale="log", title=name, xlabel="learning rate of Adam", ylabel=reported)
        axis.set_xticks(PROBLEMS[name].rates, [f"{rate:g}" for rate in PROBLEMS[name].rates])
        axis.xaxis.minorticks_off()
        if name != "digits":
            axis.set(yscale="log")
    axes[0].legend(frameon=False)
    finish_figure(figure, path, axes)


def main(config: Config) -> None:
    rows = run(config)
    FIGURES.mkdir(parents=True, exist_ok=True)
    plot(rows, FIGURES / "watched_steps.png")
    print("wrote", FIGURES / "watched_steps.png")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
