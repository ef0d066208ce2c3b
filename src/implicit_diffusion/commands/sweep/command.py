"""Reward against KL over a range of KL weights: the paper's curves for any model and reward, beside the best possible.

Every β is a fine-tuning run of its own (`implicit_diffusion.commands.finetune.command`), in a subfolder of the sweep's
folder. Finished runs are kept and interrupted ones are continued, so that a sweep can be stopped at any time and given
further β later. The frontier is that of `implicit_diffusion.evaluation.bounds`, from the pretrained samples that all
runs share: for each β the reward and the path KL of the tilted law dP* ∝ e^{R/β} dP_0, below whose J no control can
get.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from implicit_diffusion.commands.finetune import command as finetune
from implicit_diffusion.commands.finetune import config as finetune_config
from implicit_diffusion.commands.finetune.planning import pretrained_samples
from implicit_diffusion.commands.finetune.problem.setup import build
from implicit_diffusion.commands.finetune.problem.weighing import weighed_samples
from implicit_diffusion.commands.finetune.report.headline import opening
from implicit_diffusion.commands.finetune.result import read_run_summary
from implicit_diffusion.commands.finetune.specs import setup_spec
from implicit_diffusion.commands.resuming import resume
from implicit_diffusion.commands.rewards.weights import title
from implicit_diffusion.commands.shared.formatting import beside, distinct, number, percent
from implicit_diffusion.commands.shared.inputs import absolute, inputs, record_inputs
from implicit_diffusion.commands.shared.models.by_name import check_weights
from implicit_diffusion.commands.shared.opening import continuing, dated
from implicit_diffusion.commands.sweep.config import Config as Config
from implicit_diffusion.commands.sweep.figure import plot
from implicit_diffusion.commands.sweep.folders import check_folder, finished, folder_of, holds_little, settings
from implicit_diffusion.commands.sweep.summary import FrontierPoint, SweepRow, SweepSummary
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, mean_and_error
from implicit_diffusion.evaluation.plans import make_plan
from implicit_diffusion.extras import require
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.processes import from_main, main_only
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.provenance import Change, check_version, verified
from implicit_diffusion.scorers import closing

CURVE = 12  # KL weights of the drawn frontier


def run(config: Config) -> dict[str, Any]:
    """Make all runs that are not finished yet, then the table, `figures/frontier.png` and `summary.json`.

    Returns:
        The summary, as summary.json holds it (`sweep.summary.SweepSummary`).

    Raises:
        InvalidInputError: from the options, the model or the reward; the folder holds something else, or a sweep of
            other options.
        KeyboardInterrupt: the present run was interrupted; the same command continues.
    """
    config.check()
    config = replace(config, each=absolute(replace(config.each, out=config.each.out or dated("sweep"))))
    assert config.each.out is not None
    directory = RunDirectory(config.each.out)
    with directory.held(), clock.run(), closing():
        check_version(directory, config.accept_changes)
        check_folder(directory, config)
        clock.keep(directory.path)
        fingerprints = inputs(config.each)
        with verified(directory, config.accept_changes, fingerprints):
            return _run(config, directory, fingerprints)


def _run(config: Config, directory: RunDirectory, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """The same in a directory that is held, with verified inputs."""
    out = directory.path
    setup = build(setup_spec(config.each))
    check_weights(directory, setup.weights)
    fingerprints |= setup.weights
    conditional = setup.chain.condition is not None
    directory.write_config(settings(config), "sweep")
    with continuing(directory, f"the same command, with --out {shlex.quote(str(out))}, continues the sweep"):
        record_inputs(directory, config.each, fingerprints, config=settings(config))
        drawn = pretrained_samples(setup, config.each.starts, directory, fingerprints)
        samples = weighed_samples(setup, drawn)
        betas = sorted(config.kl_weights or (b.beta for b in _bounds(samples, None, conditional=conditional)))
        for place, beta in enumerate(betas, start=1):
            print(f"KL weight {beta:.6g}, run {place} of {len(betas)}")
            _one(replace(config.each, kl_weight=beta, out=folder_of(out, beta)), samples, config.accept_changes)
        return from_main(lambda: _conclude(config, samples, directory, conditional=conditional))


def _conclude(config: Config, samples: Evaluation, directory: RunDirectory, *, conditional: bool) -> dict[str, Any]:
    """Table, figure and summary of all finished runs."""
    out = directory.path
    folders = finished(out)
    frontier = _bounds(samples, _curve(list(folders)), conditional=conditional)
    summary = SweepSummary(
        reward=title(config.each.reward),
        reward_pretrained=mean_and_error(samples.reward),
        rows=[SweepRow.of(read_run_summary(folder), beta, folder.name) for beta, folder in folders.items()],
        frontier=[FrontierPoint.of(b) for b in frontier],
    )
    directory.write_summary(summary.to_json())
    show(summary)
    metrics = {beta: RunDirectory(folder).read_metrics() for beta, folder in folders.items()}
    plot(summary, metrics, frontier, directory.figure("frontier"))
    print(f"cost      {clock.in_words(clock.seconds(out))}")
    print(f"sweep     {out}")
    return summary.to_json()


def _one(config: finetune_config.Config, pretrained: Evaluation, accept_changes: tuple[Change, ...]) -> None:
    """Make a run, continue it, or leave it alone where it is finished."""
    assert config.out is not None
    directory = RunDirectory(config.out)
    judged, reported = from_main(lambda: [(directory.path / name).exists() for name in ("summary.json", "report.html")])
    if reported:
        print(f"finished  {config.out}")
    elif judged or directory.has_state:
        resume(config.out, accept_changes)
    else:
        if holds_little(config.out):
            _remove(config.out)
        finetune.run(config, pretrained=pretrained)


@main_only
def _remove(folder: Path) -> None:
    """Remove what an early end of a run has left."""
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=not any(folder.glob("*")))


def _bounds(samples: Evaluation, betas: list[float] | None, *, conditional: bool) -> tuple[Bound, ...]:
    """The optimum for each β, the largest β first; by default for those of a plan."""
    with part("planning"):
        return make_plan(samples, betas, conditional=conditional).bounds


def _curve(betas: list[float]) -> list[float]:
    """These β, and some in between."""
    between = np.geomspace(max(betas), min(betas), CURVE).tolist() if len(betas) > 1 else []
    return sorted({*betas, *between}, reverse=True)


def show(summary: SweepSummary) -> None:
    """Print the table; all of its numbers are from the noise that the runs were judged on."""
    require("rich")
    from rich.console import Console
    from rich.table import Table

    rows = summary.rows
    before = number(*rows[0].headline.reward_before)
    table = Table(
        title=f"{summary.reward} against path KL (pretrained reward {before})",
        caption="J is KL weight × path KL − reward; before training it is minus the pretrained reward. Captured is "
        "the share of its possible fall, from there to the best J, that a run made. Every ± is one standard error.",
    )
    for column in ("--kl-weight", "reward", "path KL (nats)", "J", "best J", "captured"):
        table.add_column(column, justify="right")
    weights = distinct([row.kl_weight for row in rows])
    for weight, row in zip(weights, rows):
        headline = row.headline
        table.add_row(
            weight,
            number(*headline.reward_after),
            number(*headline.path_kl or (None,)),
            _to_digits_of(headline.j_after, headline.j_fall),
            _to_digits_of(headline.j_bound, headline.j_possible),
            "J rose" if headline.worse else percent(*headline.captured or (None,)),
        )
    for weight, row in zip(weights, rows):
        for sentence in opening(row.headline.worse, row.stopped, row.updates):
            print(f"KL weight {weight}: {sentence}")
    Console().print(table)


def _to_digits_of(estimate: Estimate | None, other: Estimate | None) -> str:
    """The mean of an estimate, to the digits that the error of another one leaves standing."""
    return beside(None if estimate is None else estimate.mean, None if other is None else other.error)
