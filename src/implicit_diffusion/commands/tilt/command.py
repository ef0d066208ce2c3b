"""Reward training of a trained energy-based model, against the exact optimum.

    minimise  −E_π R + w KL(π‖π_0),        optimum  π* ∝ π_0 e^{R/w}

over the model's own parameters, from π_0 on. R may be a black box; on the plane everything is known by quadrature:
E_π R under the model, E R under π*, and what of the difference was gained.

The result is that of the unweighted loop. A half of the plane that should keep a little mass may lose its last weighted
particle, and nothing pulls back then; unweighted particles that lag there still measure V − V_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.commands.rewards.trust import is_own
from implicit_diffusion.commands.shared.formatting import distinct
from implicit_diffusion.commands.shared.inputs import inputs
from implicit_diffusion.commands.shared.opening import dated, in_folder, opened
from implicit_diffusion.commands.shared.pictures import plane_pixels
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.commands.shared.summaries import read_summary, to_json
from implicit_diffusion.commands.tilt.config import Config
from implicit_diffusion.commands.tilt.exact import ExactTilt, Tradeoff, TrainedTradeoff, half_plane
from implicit_diffusion.commands.tilt.summary import Row, Summary, between, over_seeds, plot, show
from implicit_diffusion.commands.tilt.training import START, TiltRun, at_model, train
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.models.energy_model import EnergyModel, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import check_divides, main_only
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.study import Study
from implicit_diffusion.runs.trackers.opening import tracked
from implicit_diffusion.runs.trackers.tracking import group_of
from implicit_diffusion.scorers import TIMEOUT, closing


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """All arms at every weight; returns what summary.json holds, and leaves model/w-<weight> for every weight.

    Args:
        config: the options.
        directory: of an interrupted study to continue; None begins a new one.

    Raises:
        InvalidInputError: a model that is not of the plane, a reward that does not fit, an optimum that does not fit on
            the quadrature's grid, or a number out of range.
        NonFiniteError: a training that overflowed.
    """
    config.check()
    check_divides("particles", config.particles)
    resumed = directory is not None
    config, directory = in_folder(config, directory, dated("tilt"))
    with directory.held(), closing(), tracked(directory, config.track) as directory:
        fingerprints = inputs(config)
        model = load_energy_model(config.model)
        check_model(model)
        with GlobalGenerators(Noise(config.seed), START, 0):
            reward = read_reward(config.reward, config.reward_python, config.reward_timeout)
            exact = ExactTilt(model, reward)
        optima = {weight: exact.optimum(weight) for weight in config.kl_weights}
        with opened("tilt", config, directory, resumed=resumed, fingerprints=fingerprints):
            rows = _study(config, model, reward, exact, optima, Study(directory, config.keep))
            summary = Summary(exact.reward_initial, rows, exact.frontier(between(config.kl_weights)))
            return _conclude(config, summary, directory)


@main_only
def _conclude(config: Config, summary: Summary, directory: RunDirectory) -> dict[str, Any]:
    """The figure and the table; returns what summary.json holds."""
    plot(summary, directory.figure("tilt"))
    written: dict[str, Any] = to_json(summary)
    directory.write_summary(written)  # the last file: with it, the run is finished
    show(summary, config.arms[0], directory)
    return written


@main_only
def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figure of a finished study again, print its table, and return its summary."""
    config = read_options(Config, directory)
    summary = read_summary(Summary, directory)
    plot(summary, directory.figure("tilt"))
    show(summary, config.arms[0], directory)
    written: dict[str, Any] = to_json(summary)
    return written


def check_model(model: EnergyModel) -> None:
    """Raise `InvalidInputError` unless a model is of the plane, with a sampler whose particles can have weights."""
    if model.architecture.event_shape != (2,):
        raise InvalidInputError(f"--model: a model of the plane is needed, got events {model.architecture.event_shape}")
    if not model.moves.kernel().weighted:
        raise InvalidInputError(
            f"--model: its sampler {model.moves.sampler} does not support weights; train it with another"
        )


def read_reward(name: str, python: Path | None = None, timeout: float = TIMEOUT) -> Callable[[Tensor], Tensor]:
    """The reward called `name`; the other arguments are those of `load_reward`.

    Raises:
        InvalidInputError: no such reward, or one of images.
    """
    if name == "half-plane":
        return half_plane
    if not is_own(name):
        raise InvalidInputError(
            f"--reward {name!r} is neither half-plane nor of the form FILE.py:function or "
            "FILE.py:Class(weight=2); shipped rewards are of images, and the model is of the plane"
        )
    return load_reward(name, python=python, timeout=timeout)


def _study(
    config: Config,
    model: EnergyModel,
    reward: Callable[[Tensor], Tensor],
    exact: ExactTilt,
    optima: dict[float, Tradeoff],
    study: Study,
) -> list[Row]:
    """A row of results for every weight, from all runs, of which those that are missing are made."""
    folders = dict(zip(config.kl_weights, distinct(config.kl_weights, digits=6)))
    seeds, rows = range(config.seed, config.seed + config.seeds), []
    starts = {}
    with progress(config.seeds, "annealing") as bar:
        for seed in seeds:
            starts[seed] = at_model(model, config.particles, Noise(seed))
            bar.update()

    def make(weight: float, arm: str, seed: int) -> dict[str, float]:
        training = TiltRun(weight, arm == "weighted", config.steps, config.lr, seed)
        trained = train(training, model, starts[seed], reward)
        if (arm, seed) == (config.arms[0], config.seed):
            log_z = exact.quadrature.log_density(trained.potential)[1]
            trained.with_log_z(log_z, 0.0).save(study.directory.model / f"w-{folders[weight]}")
        return asdict(exact.judge(trained, weight))

    def line(weight: float, arm: str, seed: int, result: dict[str, float]) -> list[dict[str, Any]]:
        return [{"kl_weight": weight, "arm": arm, "seed": seed} | result]

    with progress(len(config.arms) * len(config.kl_weights) * config.seeds, "tilt") as bar:
        for weight, optimum in optima.items():
            arms = {}
            for arm in config.arms:
                results = []
                for seed in seeds:
                    key = weight, arm, seed
                    results.append(study.once(*key, make=partial(make, *key), lines=partial(line, *key)))
                    if (arm, seed) == (config.arms[0], config.seed):
                        _show(study.directory, f"w-{folders[weight]}", group_of(line(*key, results[-1])[0]), model)
                    bar.update()
                arms[arm] = over_seeds([TrainedTradeoff(**result) for result in results])
            rows.append(Row(weight, optimum, **arms))
    return rows


def _show(directory: RunDirectory, folder: str, group: str, model: EnergyModel) -> None:
    """Show the particles of a model that is kept to the trackers, beside those of the model before."""
    if directory.tracking.wanted:
        models = load_energy_model(directory.model / folder), model
        trained, before = (each.particles * each.scale + each.shift for each in models)
        pixels = plane_pixels(trained, beside=before, words="before training")
        directory.tracking.picture(0, "particles", pixels, group)
