"""The paper's theory in numbers: what it proves, beside what the loops of this library do where all is known.

    rates    the single loop under the paper's schedules: how the mean of ‖∇ℓ‖² falls, on three potentials
    floors   constant steps: what is left, against h and against η/h
    queue    denoising of a one-dimensional Gaussian, against its closed form
    lag      how far particles are behind θ, without and with weights

`problems` has the potentials, `mean_field`, `linear` and `denoising` what is exact about them.
"""

from __future__ import annotations

from typing import Any

from implicit_diffusion.commands.shared.opening import study
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.commands.shared.summaries import to_json
from implicit_diffusion.commands.theory.config import Config
from implicit_diffusion.commands.theory.denoising import BATCH
from implicit_diffusion.commands.theory.fitted import summarise
from implicit_diffusion.commands.theory.lag import PARTICLES
from implicit_diffusion.commands.theory.runs import MANY, Results, measure
from implicit_diffusion.commands.theory.summary import show
from implicit_diffusion.processes import check_divides, main_only
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.study import Study


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """The parts that are asked for, summary, figures; returns what summary.json holds.

    Args:
        config: the options.
        directory: of an interrupted study to continue; None begins a new one.

    Raises:
        InvalidInputError: a number out of range, or an `out` with something in it.
    """
    config.check()
    for count in (config.particles, MANY, PARTICLES, BATCH):
        check_divides("particles", count)
    with study("theory", config, directory) as (config, directory):
        return _study(config, directory)


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figures again, and write and print the numbers, from the runs that are kept."""
    return _study(read_options(Config, directory), directory)


def _study(config: Config, directory: RunDirectory) -> dict[str, Any]:
    """The runs that are missing, and what follows from all of them."""
    return _conclude(config, measure(config, Study(directory, config.keep)), directory)


@main_only
def _conclude(config: Config, results: Results, directory: RunDirectory) -> dict[str, Any]:
    """Summary and figures; returns what summary.json holds."""
    from implicit_diffusion.commands.theory.figures import draw

    summary = summarise(config, results)
    draw(config, results, summary, directory)
    written: dict[str, Any] = to_json(summary)
    directory.write_summary(written)  # the last file: with it, the run is finished
    show(summary, directory.path)
    return written
