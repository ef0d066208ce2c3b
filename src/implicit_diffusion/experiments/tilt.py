"""Reward training of a trained energy-based model, against the exact optimum.

    minimise  −E_π R + w KL(π‖π_0),        optimum  π* ∝ π_0 e^{R/w}

over the model's own parameters, from π_0 on. R may be a black box; on the plane everything is known by quadrature:
E_π R under the model, E R under π*, and what of the difference was gained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments.energy_model import EnergyModel, load_energy_model
from implicit_diffusion.experiments.planar import CELL, HALF, Quadrature
from implicit_diffusion.experiments.ranges import at_least, positive
from implicit_diffusion.experiments.reward_names import load_reward
from implicit_diffusion.loops import Single, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ReverseKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.samplers.followers import annealed
from implicit_diffusion.samplers.resampling import systematic

START, TRAIN, CHOOSE = range(3)  # streams of noise
ARMS = ("unweighted", "weighted")
ANNEALING = 200  # steps


@dataclass(frozen=True)
class Config:
    """Train a trained energy-based model of the plane for a reward, with a KL leash to what it was."""

    model: Path
    """The model/ folder of an `implicit-diffusion ebm` run."""
    reward: str = "half-plane"
    """"half-plane", 1 where x_1 ≥ 0, or your own FILE.py:function from (n, 2) to (n,); a black box will do."""
    kl_weights: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 5.0)
    """w, in reward per nat."""
    steps: int = 800
    """Updates of θ."""
    particles: int = 512
    """n."""
    lr: float = 5e-3
    """Of Adam at the start; cosine decay to zero."""
    seeds: int = 5
    """Runs of every arm and weight."""
    seed: int = 0
    out: Path | None = None
    """Run directory, new or empty. By default runs/tilt-<time>."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=1, particles=16, seeds=1, seed=0)
        if self.particles % 8:
            raise InvalidInputError(f"--particles must be a multiple of 8, got {self.particles}")
        if not self.kl_weights or not all(0 < w < math.inf for w in self.kl_weights):
            raise InvalidInputError(f"--kl-weights must be positive and finite, got {self.kl_weights}")
        positive(self, "lr")


def half_plane(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """1 where x_1 ≥ 0."""
    return (x[:, 0] >= 0).to(x.dtype)


def run(config: Config) -> dict[str, Any]:
    """Both arms at every weight; returns the summary.

    Raises:
        InvalidInputError: no model of the plane, a reward that does not fit, or a number out of range.
    """
    config.check()
    out = config.out or dated("tilt")
    RunDirectory.check(out)
    model = load_energy_model(config.model)
    if model.architecture.event_shape != (2,):
        raise InvalidInputError(f"--model: a model of the plane is needed, got events {model.architecture.event_shape}")
    if not model.moves.kernel().weighted:
        raise InvalidInputError(f"--model: its sampler {model.moves.sampler} knows no weights; train it with another")
    reward = half_plane if config.reward == "half-plane" else load_reward(config.reward)
    exact = Exact(model, reward)
    directory = RunDirectory.create(out)
    directory.write_config(replace(config, out=out))
    rows = []
    with progress(len(ARMS) * len(config.kl_weights) * config.seeds, "tilt") as bar:
        for weight in config.kl_weights:
            row: dict[str, Any] = {"kl_weight": weight, "optimum": exact.optimum(weight)}
            for arm in ARMS:
                found = []
                for seed in range(config.seed, config.seed + config.seeds):
                    found.append(exact.judge(train(config, model, reward, weight, arm, seed), weight))
                    directory.append_metrics({"kl_weight": weight, "arm": arm, "seed": seed} | found[-1])
                    bar.update()
                row[arm] = _over_seeds(found)
            rows.append(row)
    summary = {"reward_initial": exact.reward_initial, "rows": rows}
    directory.write_summary(summary)
    plot(summary, directory.figure("tilt"))
    show(summary, directory)
    return summary


def train(
    config: Config, model: EnergyModel, reward: Callable[[Tensor], Tensor], weight: float, arm: str, seed: int
) -> nn.Module:
    """The potential after training, from particles that annealing brings to π_0."""
    noise = Noise(seed)
    potential = model.architecture.build(Noise(0))
    potential.load_state_dict(model.potential.state_dict())
    particles = initial(model, config.particles, noise, weighted=arm == "weighted")

    def in_data_units(z: Tensor) -> Tensor:
        return reward(z * model.scale + model.shift)

    adam = torch.optim.Adam(potential.parameters(), lr=config.lr, betas=(0.9, 0.99))
    loop = Single(
        potential,
        model.moves.kernel(),
        Reward(in_data_units) + weight * ReverseKL.to_initial(potential),
        Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.steps)),
        particles=particles.x,
        noise=noise.stream(TRAIN),
        weighted=arm == "weighted",
    )
    loop.refresh(particles)
    for _ in loop.run(config.steps):
        pass
    return potential


def initial(model: EnergyModel, n: int, noise: Noise, *, weighted: bool) -> Particles:
    """Particles from π_0: with their weights, or resampled by them; log Z is told relative to π_0's."""
    followers = annealed(model.potential.tempered, model.moves.kernel(), n, noise.stream(START), steps=ANNEALING)
    held = followers.particles(model.potential)
    if weighted:
        return Particles(held.x, held.log_weights)
    assert held.log_weights is not None
    uniform = torch.rand((), generator=noise.generator(CHOOSE))
    return Particles(held.x[systematic(held.log_weights, uniform)])


class Exact:
    """Expectations under π_0, the trained models and the optimum, by quadrature.

    Args:
        model: π_0.
        reward: R of points in the data's units.

    Raises:
        InvalidInputError: a reward of another shape or not finite, or a model that does not fit the quadrature's grid.
    """

    def __init__(self, model: EnergyModel, reward: Callable[[Tensor], Tensor]) -> None:
        self.quadrature = Quadrature(model.shift, model.scale)
        values = reward(self.quadrature.grid.to(model.particles))
        if values.shape != (len(self.quadrature.grid),) or not values.isfinite().all():
            raise InvalidInputError(
                f"--reward must return one finite number per point, shape (n,) for input (n, 2), got shape "
                f"{tuple(values.shape)} for {tuple(self.quadrature.grid.shape)}"
            )
        outside = (model.particles * model.scale + model.shift).abs().amax(1) > HALF
        if outside.double().mean() > 0.01 or model.scale.amin() < 2 * CELL:
            raise InvalidInputError(
                f"--model: the quadrature covers [−{HALF:g}, {HALF:g}]² in cells of {CELL:g}, which does not fit "
                f"data of mean {model.shift.tolist()} and deviation {model.scale.tolist()}; train on standardised data"
            )
        self.reward = values.double()
        self.log_initial = self.quadrature.log_density(model.potential)[0]
        self.reward_initial = self._mean(self.log_initial, self.reward)

    def optimum(self, weight: float) -> dict[str, float]:
        """Of −E R + w KL: its reward, KL to π_0 and value."""
        log_density = self.log_initial + self.reward / weight
        log_density = log_density - log_density.logsumexp(0) - math.log(self.quadrature.area)
        return self._describe(log_density, weight)

    def judge(self, potential: nn.Module, weight: float) -> dict[str, float]:
        """The same of a trained potential."""
        assert isinstance(potential, Tilted)
        return self._describe(self.quadrature.log_density(potential)[0], weight)

    def _describe(self, log_density: Tensor, weight: float) -> dict[str, float]:
        reward, kl = self._mean(log_density, self.reward), self._mean(log_density, log_density - self.log_initial)
        return {"reward": reward, "kl": kl, "objective": weight * kl - reward}

    def _mean(self, log_density: Tensor, values: Tensor) -> float:
        return (log_density.exp() @ values).item() * self.quadrature.area


def _over_seeds(found: list[dict[str, float]]) -> dict[str, Any]:
    over = {name: [f[name] for f in found] for name in found[0]}
    means: dict[str, Any] = {name: mean(values) for name, values in over.items()}
    return means | {"reward_std": stdev(over["reward"]) if len(found) > 1 else None}


def show(summary: dict[str, Any], directory: RunDirectory) -> None:
    """Print rewards under the model beside the optimum."""
    print(f"expected reward under the model, by quadrature; {summary['reward_initial']:.3f} before training")
    print(f"  {'w':>6s} {'optimum':>9s} " + " ".join(f"{arm:>18s}" for arm in ARMS))
    for row in summary["rows"]:
        arms = (
            f"{row[a]['reward']:.3f}" + (f" ± {row[a]['reward_std']:.3f}" if row[a]["reward_std"] is not None else "")
            for a in ARMS
        )
        print(f"  {row['kl_weight']:6g} {row['optimum']['reward']:9.3f} " + " ".join(f"{a:>18s}" for a in arms))
    print(f"run       {directory.path}")


def plot(summary: dict[str, Any], path: Path) -> None:
    """Reward against KL to π_0: the frontier of optima, and what the arms reach."""
    from implicit_diffusion.experiments.drawing import finish, sheet
    from implicit_diffusion.experiments.ebm_figures import COLOURS

    figure = sheet(5.6, 4)
    axis = figure.subplots()
    rows = summary["rows"]
    optima = sorted((row["optimum"]["kl"], row["optimum"]["reward"]) for row in rows)
    axis.plot(*zip(*optima), color="0.3", marker="x", label="optimum")
    for arm, colour in zip(ARMS, (COLOURS["implicit"], COLOURS["weighted"])):
        kls, rewards = ([row[arm][name] for row in rows] for name in ("kl", "reward"))
        errors = [row[arm]["reward_std"] or 0.0 for row in rows]
        axis.errorbar(kls, rewards, yerr=errors, fmt="o", ms=4, color=colour, label=f"{arm}, ± deviation over seeds")
    axis.set(xlabel="KL(π‖π_0), nats", ylabel="expected reward under the model")
    axis.legend(frameon=False)
    finish(figure, path, [axis])
