"""Reward training of a trained energy-based model, against the exact optimum.

    minimise  −E_π R + w KL(π‖π_0),        optimum  π* ∝ π_0 e^{R/w}

over the model's own parameters, from π_0 on. R may be a black box; on the plane everything is known by quadrature:
E_π R under the model, E R under π*, and what of the difference was gained.

The result is that of the unweighted loop. A half of the plane that should keep a little mass may lose its last weighted
particle, and nothing pulls back then; unweighted ones that lag there go on telling what V − V_0 is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.commands.rewards.trust import is_own
from implicit_diffusion.commands.shared.formatting import distinct
from implicit_diffusion.commands.shared.inputs import absolute, inputs, record_inputs
from implicit_diffusion.commands.shared.ranges import at_least, positive
from implicit_diffusion.commands.shared.studies import Study
from implicit_diffusion.commands.tilt.exact import AT_EDGE, Exact, half_plane
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.global_generators import Draws
from implicit_diffusion.loops import Single, Update
from implicit_diffusion.models.energy_model import EnergyModel, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ReverseKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.runs.provenance import is_recorded
from implicit_diffusion.samplers.followers import annealed
from implicit_diffusion.samplers.resampling import systematic

START, TRAIN, CHOOSE = range(3)  # streams of noise
Arm = Literal["unweighted", "weighted"]
ARMS: tuple[Arm, ...] = ("unweighted", "weighted")  # the first is the one to use
ANNEALING = 200  # steps


@dataclass(frozen=True)
class Config:
    """Train a trained energy-based model of the plane for a reward, with a KL leash to what it was."""

    model: Path
    """The model/ folder of an `implicit-diffusion ebm` run."""
    reward: str = "half-plane"
    """The reward: "half-plane", which is 1 where x_1 ≥ 0, or your own FILE.py:function.
    It takes points (n, 2) to (n,) and needs no gradient.
    A class takes literal arguments, as in "FILE.py:Class(weight=2)"."""
    kl_weights: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 5.0)
    """KL weights w, in reward per nat; one gives a result, several a study."""
    arms: tuple[Arm, ...] = ARMS
    """Ways of training to compare; the models that are kept are those of the first."""
    steps: int = 2000
    """Number of updates of the parameters θ."""
    particles: int = 512
    """Number of particles, a multiple of 8."""
    lr: float = 5e-3
    """Learning rate of Adam at the start; it decays to zero along a cosine."""
    seeds: int = 5
    """Number of runs of every arm and weight; the models that are kept are those of the first."""
    seed: int = 0
    """Seed of the first run; the same seed gives the same models, bit for bit."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/tilt-<time>."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=1, particles=16, seeds=1, seed=0)
        if self.particles % 8:
            raise InvalidInputError(f"--particles must be a multiple of 8, got {self.particles}")
        if not self.kl_weights or not all(0 < w < math.inf for w in self.kl_weights):
            raise InvalidInputError(f"--kl-weights must be positive and finite, got {self.kl_weights}")
        if len(set(self.kl_weights)) < len(self.kl_weights):
            raise InvalidInputError(f"--kl-weights must differ from each other, got {self.kl_weights}")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise InvalidInputError(f"--arms must be one or both of {' '.join(ARMS)}, got {self.arms}")
        positive(self, "lr")


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """All arms at every weight; returns the summary, and leaves model/w-<weight> for every weight.

    Args:
        config: see there.
        directory: of an interrupted study to go on with; None begins a new one.

    Raises:
        InvalidInputError: no model of the plane, a reward that does not fit, an optimum that the quadrature's grid does
            not hold, or a number out of range.
        NonFiniteError: a training that overflowed.
    """
    config.check()
    begun = directory is not None
    out = directory.path if directory else config.out or dated("tilt")
    config, directory = absolute(replace(config, out=out)), RunDirectory(out.absolute())
    with directory.held():
        return _run(config, directory, begun)


def _run(config: Config, directory: RunDirectory, begun: bool) -> dict[str, Any]:
    """The same in a directory that is held."""
    rests_on = inputs(config)
    model = load_energy_model(config.model)
    if model.architecture.event_shape != (2,):
        raise InvalidInputError(f"--model: a model of the plane is needed, got events {model.architecture.event_shape}")
    if not model.moves.kernel().weighted:
        raise InvalidInputError(f"--model: its sampler {model.moves.sampler} knows no weights; train it with another")
    if config.reward != "half-plane" and not is_own(config.reward):
        raise InvalidInputError(
            f"--reward {config.reward!r} is neither half-plane nor of the form FILE.py:function or "
            "FILE.py:Class(weight=2); shipped rewards are of images, and the model is of the plane"
        )
    with Draws(Noise(config.seed), START, 0):
        reward = half_plane if config.reward == "half-plane" else load_reward(config.reward)
        exact = Exact(model, reward)
    optima = {weight: exact.optimum(weight) for weight in config.kl_weights}
    if not begun:
        directory.start(config)
    if not (begun and is_recorded(directory)):
        record_inputs(directory, config, rests_on)
    with directory.resumable():
        rows = _study(config, model, reward, exact, optima, Study(directory))
        summary = {"reward_initial": exact.reward_initial, "rows": rows}
        plot(summary, exact, directory.figure("tilt"))
        directory.write_summary(summary)  # the last file: with it, the run is finished
    show(summary, directory)
    return summary


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figure of a finished study again, print its table, and return its summary.

    Raises:
        InvalidInputError: a model that is no longer there; a reward of the user's own, which would have to run for it.
    """
    config = directory.read_config() or {}
    if config.get("reward") != "half-plane":
        raise InvalidInputError(f"{directory.path}: its figure needs the reward, which is code: run `tilt` again")
    summary: dict[str, Any] = json.loads((directory.path / "summary.json").read_text(encoding="utf-8"))
    plot(summary, Exact(load_energy_model(config["model"]), half_plane), directory.figure("tilt"))
    show(summary, directory)
    return summary


def _study(
    config: Config,
    model: EnergyModel,
    reward: Callable[[Tensor], Tensor],
    exact: Exact,
    optima: dict[float, dict[str, float]],
    study: Study,
) -> list[dict[str, Any]]:
    """A row of results for every weight."""
    names = dict(zip(config.kl_weights, distinct(config.kl_weights, digits=6)))
    seeds, rows = range(config.seed, config.seed + config.seeds), []
    with progress(config.seeds, "annealing") as bar:
        starts = {}
        for seed in seeds:
            starts[seed] = at_model(model, config.particles, Noise(seed))
            bar.update()

    def make(weight: float, arm: str, seed: int) -> dict[str, float]:
        trained = train(config, model, starts[seed], reward, weight, arm, seed)
        if (arm, seed) == (config.arms[0], config.seed):
            log_z = exact.quadrature.log_density(trained.potential)[1]
            trained.with_log_z(log_z, 0.0).save(study.directory.model / f"w-{names[weight]}")
        return exact.judge(trained, weight)

    def line(weight: float, arm: str, seed: int, found: dict[str, float]) -> list[dict[str, Any]]:
        return [{"kl_weight": weight, "arm": arm, "seed": seed} | found]

    with progress(len(config.arms) * len(config.kl_weights) * config.seeds, "tilt") as bar:
        for weight, optimum in optima.items():
            row: dict[str, Any] = {"kl_weight": weight, "optimum": optimum}
            for arm in config.arms:
                found = []
                for seed in seeds:
                    one = study.once(
                        weight, arm, seed, make=partial(make, weight, arm, seed), lines=partial(line, weight, arm, seed)
                    )
                    found.append(one)
                    bar.update()
                row[arm] = _over_seeds(found)
            rows.append(row)
    return rows


def train(
    config: Config,
    model: EnergyModel,
    start: Particles,
    reward: Callable[[Tensor], Tensor],
    weight: float,
    arm: str,
    seed: int,
) -> EnergyModel:
    """The model after training, from weighted particles `start` that stand for π_0; without its log Z.

    Raises:
        NonFiniteError: NaN or infinity, with options to change.
    """
    noise = Noise(seed)
    potential = model.architecture.build(Noise(0))
    potential.load_state_dict(model.potential.state_dict())
    particles = start if arm == "weighted" else resampled(start, noise)

    def in_data_units(z: Tensor) -> Any:
        return reward((z * model.scale + model.shift).to(z))  # in the precision in which the grid was seen

    adam = torch.optim.Adam(potential.parameters(), lr=config.lr, betas=(0.9, 0.99))
    try:
        with Draws(noise, TRAIN, 0):
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
    except NonFiniteError as error:
        raise NonFiniteError(f"w = {weight:g}, {arm}, seed {seed}: {error}. Take a smaller --lr") from error
    return replace(model, potential=potential, particles=resampled(loop.particles, noise).x, log_z=None, log_z_se=None)


def at_model(model: EnergyModel, n: int, noise: Noise) -> Particles:
    """Particles that annealing brings to π_0, with their weights; log Z is told relative to π_0's."""
    followers = annealed(model.potential.tempered, model.moves.kernel(), n, noise.stream(START), steps=ANNEALING)
    held = followers.particles(model.potential)
    return Particles(held.x, held.log_weights)


def resampled(particles: Particles, noise: Noise) -> Particles:
    """The same law in particles of equal weight."""
    if particles.log_weights is None:
        return particles
    uniform = torch.rand((), generator=noise.generator(CHOOSE))
    return Particles(particles.x[systematic(particles.log_weights, uniform)])


def _over_seeds(found: list[dict[str, float]]) -> dict[str, Any]:
    over = {name: [f[name] for f in found] for name in found[0]}
    means: dict[str, Any] = {name: mean(values) for name, values in over.items()}
    return means | {"reward_std": stdev(over["reward"]) if len(found) > 1 else None}


def show(summary: dict[str, Any], directory: RunDirectory) -> None:
    """Print rewards under the model beside the optimum."""
    print(f"expected reward under the model, by quadrature; {summary['reward_initial']:.3f} before training")
    names = _arms(summary)
    print(f"  {'w':>6s} {'optimum':>9s} " + " ".join(f"{arm:>18s}" for arm in names))
    for row in summary["rows"]:
        arms = (
            f"{row[a]['reward']:.3f}" + (f" ± {row[a]['reward_std']:.3f}" if row[a]["reward_std"] is not None else "")
            for a in names
        )
        print(f"  {row['kl_weight']:6g} {row['optimum']['reward']:9.3f} " + " ".join(f"{a:>18s}" for a in arms))
        for arm in names:
            if row[arm]["at_edge"] > AT_EDGE:
                print(f"         {arm}: {row[arm]['at_edge']:.2g} of its mass is at the edge of the grid: not exact")
    print(f"models    {directory.model}/w-<weight>, {names[0]}, of the first seed")
    print(f"run       {directory.path}")


def _arms(summary: dict[str, Any]) -> list[str]:
    return [arm for arm in summary["rows"][0] if arm in ARMS]


def plot(summary: dict[str, Any], exact: Exact, path: Path) -> None:
    """Reward against KL to π_0: the frontier of optima, and what the arms reach."""
    from implicit_diffusion.commands.ebm.figures import COLOURS
    from implicit_diffusion.commands.shared.drawing import finish, legend_above, sheet

    figure = sheet(5.6, 4)
    axis = figure.subplots()
    rows = summary["rows"]
    weights = torch.tensor([row["kl_weight"] for row in rows]).log()
    curve = torch.linspace(weights.amax() + math.log(4), weights.amin(), 50).exp().tolist()
    axis.plot(*zip(*exact.frontier(curve)), color="0.3", lw=1.2, label="optima of all w")
    optima = [(row["optimum"]["kl"], row["optimum"]["reward"]) for row in rows]
    axis.plot(*zip(*optima), color="0.3", marker="x", ls="", label="optima of these w")
    colours = {"unweighted": COLOURS["implicit"], "weighted": COLOURS["weighted"]}
    for arm, marker in zip(_arms(summary), "os"):
        colour = colours[arm]
        kls, rewards = ([row[arm][name] for row in rows] for name in ("kl", "reward"))
        errors = [row[arm]["reward_std"] or 0.0 for row in rows]
        axis.errorbar(
            kls,
            rewards,
            yerr=errors,
            fmt=marker,
            ms=7 if marker == "o" else 4,
            mfc="none",
            color=colour,
            label=f"{arm}, ± deviation over seeds",
        )
    axis.set(xlabel="KL(π‖π_0), nats", ylabel="expected reward under the model")
    legend_above(axis, columns=2)
    finish(figure, path, [axis])
