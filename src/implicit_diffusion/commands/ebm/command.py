"""Train an energy-based model by maximum likelihood in a single loop; on the plane, say exactly how good it is.

    load → build V = Gaussian + network → weighted particles under a watch → log Z by annealing → save → report

minimising KL(p_ref‖π_θ). `--compare` runs all arms at equal cost, with their learning rates searched on a grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.ebm.arms import make_loop
from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.data import Data, discrete, load_data
from implicit_diffusion.commands.ebm.judging import judge, show, what_to_change
from implicit_diffusion.commands.ebm.summary import Summary
from implicit_diffusion.commands.ebm.training import Trained, train
from implicit_diffusion.commands.shared.arrays.array_files import place_of
from implicit_diffusion.commands.shared.inputs import inputs
from implicit_diffusion.commands.shared.opening import dated, in_folder, opened
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.commands.shared.summaries import read_summary, to_json
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.energy_model import EnergyModel, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import from_main, main_only
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.provenance import check_inputs
from implicit_diffusion.runs.trackers.opening import tracked

LOOKS = 12  # exact figures on the way


@dataclass(frozen=True)
class Judging:
    """What is judged of a trained model.

    Args:
        steps: of the annealing for log Z.
        step_size_given: whether the step size of the sampler is not the default.
        digits: whether likelihoods are compared with those of simple models of the digits.
        chain_steps: length of long chains; 0 for none.
        seed: of all noise.
    """

    steps: int
    step_size_given: bool
    digits: bool
    chain_steps: int
    seed: int


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """Train, judge, save, draw; returns what summary.json holds.

    Args:
        config: the options.
        directory: of an interrupted run to continue; None begins a new one.

    Raises:
        InvalidInputError: bad options or data, before anything is trained.
        DivergenceError, NonFiniteError: training diverged; the last sound model is in the run directory.
    """
    config.check()
    resumed, kind = directory is not None, "ebm-compare" if config.compare else "ebm"
    named = config.data if config.compare else Path(place_of(config.data)[0]).stem
    config, directory = in_folder(config, directory, dated(f"{kind}-{named}"))
    if config.compare:
        from implicit_diffusion.commands.ebm.compare import compare

        with tracked(directory, config.track) as directory:
            return compare(config, directory)
    with directory.held(), clock.run(), tracked(directory, config.track) as directory:
        return _run(config, directory, resumed)


def _run(config: Config, directory: RunDirectory, resumed: bool) -> dict[str, Any]:
    """The same in a directory that is held."""
    with part("loading"):
        fingerprints = inputs(config)
        data = load_data(config.data, Noise(config.seed), dequantise=config.dequantise)
    if warning := discrete(data):
        print(f"note      {warning}")
    settings = config.settings(data)
    loop = make_loop(settings, data)
    if config.long_chains and len(data.event_shape) != 3:
        raise InvalidInputError(f"--long-chains is for images, got events {data.event_shape}; leave it out")
    resolved = config.resolved(data)
    assert resolved.judge_steps is not None
    judging = Judging(
        steps=resolved.judge_steps,
        step_size_given=resolved.step_size != replace(config, step_size=None).resolved(data).step_size,
        digits=config.data == "digits",
        chain_steps=10 * settings.updates if config.long_chains else 0,
        seed=config.seed,
    )
    with opened("ebm", resolved, directory, resumed=resumed, fingerprints=fingerprints):
        clock.keep(directory.path)
        return finish(judging, data, train(settings, data, loop, directory, LOOKS, config.keep), directory)


@part("judging")
def finish(judging: Judging, data: Data, trained: Trained, directory: RunDirectory) -> dict[str, Any]:
    """Judge, save, and write the summary: what is interrupted before that is done once more. Then draw and report."""
    if trained.fit.stopped == "interrupted":
        raise KeyboardInterrupt
    summary = judge(trained, data, judging.steps)
    advice = what_to_change(trained, summary, step_size_given=judging.step_size_given)
    summary = replace(summary, advice=[*advice, *([warning] if (warning := discrete(data)) else [])])
    return from_main(lambda: _conclude(judging, data, trained, summary, directory))


def _conclude(
    judging: Judging, data: Data, trained: Trained, summary: Summary, directory: RunDirectory
) -> dict[str, Any]:
    """What follows from the judgement; arguments as in `finish`."""
    model = trained.model.with_log_z(summary.log_z_estimate, summary.log_z_estimate_se)
    if summary.log_z is not None:
        model = model.with_log_z(summary.log_z, 0.0)
    model.save(directory.model)
    if judging.digits:
        from implicit_diffusion.commands.ebm.digits import judge_digits

        summary = replace(summary, **vars(judge_digits(model, data, judging.seed)))
    if judging.chain_steps:
        from implicit_diffusion.commands.ebm.digits import long_chains

        summary = replace(summary, **vars(long_chains(model, data, directory, judging.chain_steps, judging.seed)))
    written: dict[str, Any] = to_json(summary)
    directory.write_summary(written)
    with part("drawing"):
        _write_report(model, data, summary, directory)
    show(summary, directory.path)
    return written


@main_only
def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figures and write the report from what is on disk; prints the headline and returns the summary.

    Raises:
        InvalidInputError: data or a model that are no longer there, or a comparison that lacks a training.
    """
    config = read_options(Config, directory)
    if config.compare:
        from implicit_diffusion.commands.ebm import compare

        return compare.report(directory)
    summary = read_summary(Summary, directory)
    check_inputs(directory, inputs(config))
    data = load_data(config.data, Noise(config.seed), dequantise=config.dequantise)
    _write_report(load_energy_model(directory.model), data, summary, directory)
    show(summary, directory.path)
    written: dict[str, Any] = to_json(summary)
    return written


def _write_report(model: EnergyModel, data: Data, summary: Summary, directory: RunDirectory) -> None:
    from implicit_diffusion.commands.ebm.figures import draw
    from implicit_diffusion.commands.ebm.report import write_report

    write_report(model, data, summary, draw(model, data, summary, directory), directory)
