"""What staleness costs the queue: excess of the stationary objective over the Riccati optimum, against the step η.

    python benchmarks/queue_bias.py            # a minute: docs/figures/queue_bias.png, results/queue_bias-*.json

On linear Gaussian chains J(θ) and its attainable optimum J* are closed forms (tests/oracles.py). Plain SGD at constant
η started at the optimum settles to a stationary law around it, and E J(θ) − J* is what the noise of Γ costs, about
proportional to η, for every loop. The queue's gradients moreover belong to older θ. Independent replicas are further
coordinates of one chain: each has its own parameters, noise and reward, and all of them train at once. Both loops see
the same noise, so their difference replica by replica is far sharper than either.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import FIGURES, hardware, save
from torch import Tensor

from implicit_diffusion import Chain, Nested, Noise, PathKL, Queue, Reward
from implicit_diffusion.commands.shared.drawing import finish_figure, sheet
from implicit_diffusion.loops.base import Loop

sys.path.append(str(Path(__file__).parents[1]))  # the closed forms live with the tests

STEPS, DIM, BETA, BATCH = 6, 2, 0.5, 4
LOOPS: dict[str, type[Loop]] = {"nested": Nested, "queue": Queue}
COLOURS = {"nested": "#8a8f98", "queue": "#1f6f8b", "difference": "#c8553d"}


@dataclass(frozen=True)
class Config:
    """The published setting."""

    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    replicas: int = 64
    updates: int = 500
    burn_in: int = 150
    seed: int = 0


def run(config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)  # the tensors are tiny
    points = []
    for rate in config.rates:
        excess = {name: stationary_excess(kind, rate, config) for name, kind in LOOPS.items()}
        excess["difference"] = excess["queue"] - excess["nested"]
        points.append({"rate": rate} | {name: mean_and_error(values) for name, values in excess.items()})
    return {"N": STEPS, "B": BATCH, "beta": BETA, "points": points}


def mean_and_error(values: Tensor) -> list[float]:
    return [values.mean().item(), (values.std() / len(values) ** 0.5).item()]


def stationary_excess(kind: type[Loop], rate: float, config: Config) -> Tensor:
    """E J(θ) − J* of each replica, averaged over the updates after the burn-in, with shape (replicas,)."""
    from tests.helpers.oracles import AffineDenoiser, QuadraticReward, affine_chain, exact_terms, riccati

    single, one = affine_chain(STEPS, DIM, pretrained_rows=(STEPS - 1,))
    best, *optimum = riccati(single, one, BETA)

    def replicated(x: Tensor) -> Tensor:
        return x.detach()[..., None, :].expand(*x.shape[:-1], config.replicas, DIM)

    reference = AffineDenoiser(replicated(single.reference.gain), replicated(single.reference.shift))
    denoiser = AffineDenoiser(*map(replicated, optimum))
    shape, rows = (config.replicas, DIM), single.pretrained_rows
    chain = Chain(denoiser, single.table, shape, reference=reference.requires_grad_(False), pretrained_rows=rows)
    reward = QuadraticReward(replicated(one.p), replicated(one.q))

    def objective(gain: Tensor, shift: Tensor) -> Tensor:
        net = SimpleNamespace(gain=gain, shift=shift)
        trained = SimpleNamespace(
            denoiser=net, reference=single.reference, table=single.table, pretrained_rows=single.pretrained_rows
        )
        gained, kl, _ = exact_terms(trained, one)
        return BETA * kl - gained

    sgd = torch.optim.SGD(denoiser.parameters(), lr=rate)
    loop = kind(chain, Reward(reward) + BETA * PathKL(), sgd, batch=BATCH, noise=Noise(config.seed))
    seen = []
    while loop.update.updates < config.updates:
        loop.step()
        if loop.update.updates > config.burn_in and loop.update.updates % 10 == 0:
            with torch.no_grad():
                seen.append(torch.vmap(objective, in_dims=1)(denoiser.gain, denoiser.shift) - best)
    return torch.stack(seen).mean(0)


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: both loops; right: their difference, replica by replica. Error bars are two standard errors."""
    rates = [point["rate"] for point in results["points"]]
    figure = sheet(9.2, 3.9)
    left, right = figure.subplots(1, 2)
    labels = {"nested": "nested loop", "queue": "queue", "difference": "queue − nested, same noise"}
    for axis, names in ((left, ("nested", "queue")), (right, ("difference",))):
        for name in names:
            means, errors = zip(*(point[name] for point in results["points"]))
            style = {"color": COLOURS[name], "marker": "o", "ms": 5, "lw": 1.8, "capsize": 3, "label": labels[name]}
            axis.errorbar(rates, means, [2 * e for e in errors], **style)
        axis.set(xscale="log", yscale="log", xlabel="learning rate η of plain SGD")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
    middle = len(rates) // 2
    for axis, name, power in ((left, "nested", 1), (right, "difference", 2)):
        anchor = results["points"][middle][name][0]
        line = [0.55 * anchor * (rate / rates[middle]) ** power for rate in rates]
        axis.plot(rates, line, color="0.55", ls=":", lw=1.2, label=f"∝ η{'²' if power == 2 else ''}", zorder=0)
        axis.legend(frameon=False, loc="upper left")
    left.set(ylabel="E J(θ) − J*  (bars: ± 2 standard errors)", title="Stationary excess over the optimum")
    right.set(ylabel="difference (bars: ± 2 standard errors)", title="What the queue's staleness adds")
    finish_figure(figure, path, (left, right))


def main(config: Config) -> None:
    results = hardware() | run(config)
    for point in results["points"]:
        print(
            "η = {rate:<6g}".format(**point), *(f"{n} {point[n][0]:.5f} ± {point[n][1]:.5f}" for n in COLOURS), sep="  "
        )
    print("wrote", save("queue_bias", results))
    FIGURES.mkdir(parents=True, exist_ok=True)
    plot(results, FIGURES / "queue_bias.png")
    print("wrote", FIGURES / "queue_bias.png")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
