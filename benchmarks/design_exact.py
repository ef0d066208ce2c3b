"""Time shared out over instruments, whose information gain is known exactly: single loop and contrastive bound.

    python benchmarks/design_exact.py      # docs/figures/design_exact.png, results/design_exact-*.json

Six instruments measure one quantity each, y_i = a s_i √(6 t_i) z_i + ε_i with z, ε ~ N(0, I) and s = 2 to 8, and share
the time, Σ t_i = 1. The gain ½ Σ log(1 + 6 a² s_i² t_i) is known, and so is the best design; the scale a makes
problems of 1 to 16 nats. Both methods begin with random shares, and have 400 updates of Adam at 1000 likelihoods: the
bound 50 outcomes × (1 + 19), or 10 × (1 + 99); the loop pairs under HMC, whose step is the smallest deviation of a
posterior at equal shares.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

import torch
from common import FIGURES, machine, save
from torch import Tensor, nn

from implicit_diffusion import HMC, GaussianMixture, Noise, Single, Update
from implicit_diffusion.commands.shared.drawing import finish_figure, sheet
from implicit_diffusion.design import GaussianExperiment, InformationGain, PosteriorKernel, contrastive_bounds

SENSITIVITIES = torch.linspace(2, 8, 6)
ARMS = {"bound, 19 contrasts": "#b9a44c", "bound, 99 contrasts": "#d9863d", "loop": "#1f6f8b"}
LEAPFROGS, RENEWAL = 5, 0.05


@dataclass(frozen=True)
class Config:
    """The published setting."""

    seeds: int = 5
    scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    updates: int = 400
    likelihoods: int = 1000  # per update
    lr: float = 0.05


class Instruments(nn.Module):
    """f(z) = a s √(6 t) z, t = softmax of the parameters."""

    def __init__(self, logits: Tensor, scale: float) -> None:
        super().__init__()
        self.logits, self.scale = nn.Parameter(logits.clone()), scale

    def amplitudes(self) -> Tensor:
        return self.scale * SENSITIVITIES * (len(self.logits) * self.logits.softmax(0)).sqrt()

    def gain(self) -> Tensor:
        return self.amplitudes().square().log1p().sum() / 2

    def forward(self, z: Tensor) -> Tensor:
        return self.amplitudes() * z


def best(scale: float) -> float:
    """The largest gain: a concave problem in t."""
    instruments = Instruments(torch.zeros(6, dtype=torch.float64), scale)
    lbfgs = torch.optim.LBFGS(instruments.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = -instruments.gain()
        value.backward()
        return value

    lbfgs.step(loss)
    return instruments.gain().item()


def optimised(config: Config, arm: str, scale: float, noise: Noise) -> Instruments:
    instruments = Instruments(noise.normal((6,), 0), scale)
    experiment = GaussianExperiment(instruments, GaussianMixture(torch.zeros(1, 6)), std=1.0)
    adam = torch.optim.Adam(instruments.parameters(), lr=config.lr)
    update = Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.updates))
    if arm == "loop":
        hmc = HMC(1 / math.sqrt(1 + (scale * SENSITIVITIES[-1].item()) ** 2), LEAPFROGS)
        kernel = PosteriorKernel(hmc, experiment, RENEWAL)
        n = config.likelihoods // (2 * (hmc.evaluations_per_step + 1))  # of z and z′; the last is the exchange
        objective = InformationGain(experiment)
        for _ in Single(experiment, kernel, objective, update, particles=n, noise=noise.stream(1)).run(config.updates):
            pass
        return instruments
    contrasts = int(arm.split()[1])
    for k in range(config.updates):
        adam.zero_grad()
        outcomes = config.likelihoods // (contrasts + 1)
        (-contrastive_bounds(experiment, noise.stream(2, k), outcomes, contrasts)[0].mean()).backward()
        adam.step()
        update.schedule.step()
    return instruments


def run(config: Config) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for scale in config.scales:
        top = best(scale)
        first = [top - Instruments(Noise(seed).normal((6,), 0), scale).gain().item() for seed in range(config.seeds)]
        row: dict[str, Any] = {"scale": scale, "best": top, "missed": {"random": first}, "seconds": {}}
        for arm in ARMS:
            began = time.process_time()
            designs = [optimised(config, arm, scale, Noise(seed)) for seed in range(config.seeds)]
            row["missed"][arm] = [top - design.gain().item() for design in designs]
            row["seconds"][arm] = (time.process_time() - began) / config.seeds
        words = ", ".join(
            f"{arm} {mean(values):.3f} ± {stdev(values) / math.sqrt(len(values)):.3f}"
            for arm, values in row["missed"].items()
        )
        seconds = ", ".join(f"{arm} {s:.1f} s" for arm, s in row["seconds"].items())
        print(f"best {top:.2f} nats, of which are missed: {words}; {seconds}", flush=True)
        rows.append(row)
    save("design_exact", machine() | {"config": asdict(config), "rows": rows})
    return rows


def plot(rows: list[dict[str, Any]]) -> None:
    figure = sheet(5.6, 3.7)
    axes = figure.subplots()
    for arm, colour in ({"random": "#8a8f98"} | ARMS).items():
        missed = [row["missed"][arm] for row in rows]
        gains = [row["best"] for row in rows]
        axes.plot(gains, [mean(values) for values in missed], color=colour, lw=1.6, label=arm)
        for gain, values in zip(gains, missed, strict=True):
            axes.plot([gain] * len(values), values, "o", color=colour, ms=3.5, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="largest information gain, nats", ylabel="missed, nats")
    axes.set(title="What the designs miss")
    axes.legend(fontsize=8)
    finish_figure(figure, FIGURES / "design_exact.png", [axes])


def main(config: Config) -> None:
    rows = run(config)
    FIGURES.mkdir(parents=True, exist_ok=True)
    plot(rows)
    print("wrote", FIGURES / "design_exact.png")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
