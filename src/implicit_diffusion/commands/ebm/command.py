"""Train an energy-based model by maximum likelihood in a single loop; on the plane, say exactly how good it is.

    load → build V = Gaussian + network → weighted particles and a watch → log Z by annealing → save → report

minimising KL(p_ref‖π_θ). `--compare` runs all arms at equal cost, with their learning rates searched on a grid.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.ebm.arms import Settings, make_loop
from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.data import Data, discrete, load
from implicit_diffusion.commands.ebm.judging import judge, show, what_to_change
from implicit_diffusion.commands.ebm.training import Trained, train
from implicit_diffusion.commands.shared.array_files import place_of
from implicit_diffusion.commands.shared.inputs import absolute, inputs, record_inputs
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.energy_model import EnergyModel, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.runs.provenance import is_recorded

LOOKS = 12  # exact figures on the way


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """Train, judge, save, draw; returns the summary.

    Args:
        config: see there.
        directory: of an interrupted run to go on with; None begins a new one.

    Raises:
        InvalidInputError: bad options or data, before anything is trained.
        DivergenceError, NonFiniteError: training ran away; the last sound model is in the run directory.
    """
    config.check()
    config = absolute(replace(config, out=directory.path if directory else config.out))
    if config.compare:
        from implicit_diffusion.commands.ebm.compare import compare

        return compare(config)
    begun = directory is not None
    directory = RunDirectory(config.out or dated(f"ebm-{Path(place_of(config.data)[0]).stem}").absolute())
    with directory.held(), clock.run():
        return _run(replace(config, out=directory.path), directory, begun)


def _run(config: Config, directory: RunDirectory, begun: bool) -> dict[str, Any]:
    """The same in a directory that is held."""
    with part("loading"):
        rests_on = inputs(config)
        data = load(config.data, Noise(config.seed), dequantise=config.dequantise)
    if said := discrete(data):
        print(f"note      {said}")
    settings = config.settings(data)
    loop = make_loop(settings, data)
    if config.long_chains and len(data.event_shape) != 3:
        raise InvalidInputError(f"--long-chains is for images, got events {data.event_shape}; leave it out")
    resolved = config.resolved(data)
    if not begun:
        directory.start(resolved)
    clock.keep(directory.path)
    if not (begun and is_recorded(directory)):
        record_inputs(directory, resolved, rests_on)
    with directory.resumable():
        return finish(config, resolved, settings, data, train(settings, data, loop, directory, LOOKS), directory)


@part("judging")
def finish(
    config: Config, resolved: Config, settings: Settings, data: Data, trained: Trained, directory: RunDirectory
) -> dict[str, Any]:
    """Judge, save, and write the summary: what is interrupted before that is done once more. Then draw and report."""
    if trained.fit.stopped == "interrupted":
        raise KeyboardInterrupt
    assert resolved.judge_steps is not None
    usual = replace(config, step_size=None).resolved(data)
    summary = judge(trained, data, resolved.judge_steps)
    summary["advice"] = what_to_change(trained, summary, chosen=resolved.step_size != usual.step_size)
    summary["advice"] += [said] if (said := discrete(data)) else []
    model = trained.model.with_log_z(summary["log_z_estimate"], summary["log_z_estimate_se"])
    if "log_z" in summary:
        model = model.with_log_z(summary["log_z"], 0.0)
    model.save(directory.model)
    if config.data == "digits":
        from implicit_diffusion.commands.ebm.digits import judge_digits

        summary |= judge_digits(model, data, config.seed)
    if config.long_chains:
        from implicit_diffusion.commands.ebm.digits import long_chains

        summary |= long_chains(model, data, directory, 10 * settings.updates, config.seed)
    directory.write_summary(summary)
    with part("drawing"):
        _write_report(model, data, summary, directory)
    show(summary, directory)
    return summary


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figures and write the report from what is on disk; prints the headline and returns the summary.

    Raises:
        InvalidInputError: a comparison, whose own command draws it again; data or a model that are no longer there.
    """
    config = directory.read_config() or {}
    if config.get("compare"):
        raise InvalidInputError(
            f"{directory.path} is a comparison: the `ebm --compare` command that made it draws it again"
        )
    summary = json.loads((directory.path / "summary.json").read_text(encoding="utf-8"))
    data = load(config["data"], Noise(config["seed"]), dequantise=config["dequantise"])
    _write_report(load_energy_model(directory.model), data, summary, directory)
    show(summary, directory)
    return summary


def _write_report(model: EnergyModel, data: Data, summary: dict[str, Any], directory: RunDirectory) -> None:
    from implicit_diffusion.commands.ebm.figures import draw
    from implicit_diffusion.commands.ebm.report import write_report

    write_report(model, data, summary, draw(model, data, summary, directory), directory)
