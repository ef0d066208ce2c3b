"""Reward against KL over a range of KL weights: the paper's curves for any model and reward, beside what can be had.

Every β is a fine-tuning run of its own (`implicit_diffusion.commands.finetune.command`), in a folder of its own under
the sweep's. Finished runs are kept, interrupted ones are gone on with, so that a sweep can be stopped at any time and
given further β later. The frontier is that of `implicit_diffusion.evaluation.bounds`, from the pretrained samples that
all runs share: for each β the reward and the path KL of the tilted law dP* ∝ e^{R/β} dP_0, below whose J no control
can get.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from implicit_diffusion.commands.finetune import command as finetune
from implicit_diffusion.commands.finetune import config as finetune_config
from implicit_diffusion.commands.finetune.judging import opening
from implicit_diffusion.commands.finetune.plan import make_plan
from implicit_diffusion.commands.finetune.planning import PLANNED, PROMPTS, pretrained_samples
from implicit_diffusion.commands.finetune.problem import build
from implicit_diffusion.commands.finetune.report.figures import BEFORE, BOUND, STYLE, canvas
from implicit_diffusion.commands.finetune.report.frontier import tangent_curve
from implicit_diffusion.commands.resuming import resume
from implicit_diffusion.commands.rewards.trust import short
from implicit_diffusion.commands.shared.drawing import legend_above, save
from implicit_diffusion.commands.shared.formatting import beside, distinct, number, percent
from implicit_diffusion.commands.shared.inputs import absolute, inputs, record_inputs
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.extras import require
from implicit_diffusion.files.atomic import UNFINISHED, writing
from implicit_diffusion.files.lock import LOCK
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.runs.provenance import FILE, Change, check_version, verified
from implicit_diffusion.runs.records import as_json

CURVE = 12  # KL weights of the drawn frontier
REWARDS = ("reward_before", "reward_after", "reward_gain", "reward_exported")
KEPT = (*REWARDS, "path_kl", "j_before", "j_after", "j_fall", "j_bound", "j_possible", "captured")
LEFT_BY_AN_EARLY_END = {
    LOCK,
    FILE,
    clock.FILE,
    "config.json",
    "plan.json",
    PLANNED,
    "figures",
    PROMPTS,
    "checkpoint",
}
OF_ONE_RUN = ("kl_weight", "target_kl", "plan")  # options of finetune that a sweep decides
NOT_TAKEN = {
    name: f"--{name.replace('_', '-')} is for one run; a sweep takes --kl-weights"
    for name in (*OF_ONE_RUN, "target_kl_mode")
} | {"penalty": "a sweep compares path KLs: it has no --penalty"}
TEXTS = {  # of options that mean something else than in `finetune`
    "out": "Folder for the sweep, with one subfolder per run: new, empty, or that of a sweep with the same options, "
    "which goes on. By default runs/sweep-<time>.",
    "scheduler": "The sampler that is trained, on the noise schedule of the model. By default its samples do not "
    "depend on its initial noise: ddpm for diffusion, flow-memoryless for flow models. A sweep needs a sampler that "
    "adds noise, which euler and flow-euler do not.",
    "eta": "Amount of noise in --scheduler ddim, by default 1; a sweep needs some.",
}


@dataclass(frozen=True)
class Config:
    """Fine-tune once for every KL weight, and plot reward against KL divergence beside the best possible curve."""

    kl_weights: tuple[float, ...] = ()
    """KL weights β to train with, in units of reward per nat.
    By default they are chosen for gains of ¼ to 2 standard deviations of the pretrained reward."""
    each: finetune_config.Config = field(
        default_factory=finetune_config.Config, metadata={"without": NOT_TAKEN, "texts": TEXTS}
    )
    """Options of every run; --out is the folder of the sweep."""
    accept_changes: tuple[Change, ...] = ()
    """Changes to accept since the sweep began, as for `resume`; any other change is refused by name."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range, or an option belongs to a single run."""
        for beta in self.kl_weights:
            if not 0 < beta < float("inf"):
                raise InvalidInputError(f"--kl-weights must be positive and finite, got {beta}")
        if len(set(self.kl_weights)) < len(self.kl_weights):
            raise InvalidInputError(f"--kl-weights must differ, got {' '.join(f'{b:g}' for b in self.kl_weights)}")
        for name in OF_ONE_RUN:
            if getattr(self.each, name) not in (None, False):
                raise InvalidInputError(NOT_TAKEN[name])
        if self.each.penalty != "path-kl":
            raise InvalidInputError(NOT_TAKEN["penalty"])
        self.each.check()


def run(config: Config) -> dict[str, Any]:
    """All runs that are not finished yet, then the table, `figures/frontier.png` and `summary.json` in the folder.

    Returns:
        The summary: `rows`, one per β with the headline numbers of its run; `frontier`, the best possible reward and
        path KL per β; the pretrained reward.

    Raises:
        InvalidInputError: from the options, the model or the reward; a folder with something else in it, or with a
            sweep of other options.
        KeyboardInterrupt: the running run was interrupted; the same command goes on.
    """
    config.check()
    config = replace(config, each=absolute(replace(config.each, out=config.each.out or dated("sweep"))))
    assert config.each.out is not None
    directory = RunDirectory(config.each.out)
    with directory.held(), clock.run():
        check_version(directory, config.accept_changes)
        _check_folder(directory, config)
        clock.keep(directory.path)
        rests_on = inputs(config.each)
        with verified(directory, config.accept_changes, rests_on):
            return _run(config, directory, rests_on)


def _run(config: Config, directory: RunDirectory, rests_on: dict[str, Any]) -> dict[str, Any]:
    """The same in a directory that is held, on what it rested on where it has begun before."""
    out = directory.path
    problem = build(config.each)
    conditional = problem.chain.condition is not None
    directory.write_config(_settings(config), "sweep")
    record_inputs(directory, config.each, rests_on, config=_settings(config))
    try:
        samples = pretrained_samples(config.each, problem, directory, rests_on)
        betas = sorted(config.kl_weights or (b.beta for b in make_plan(samples, conditional=conditional).bounds))
        for place, beta in enumerate(betas, start=1):
            print(f"KL weight {beta:.6g}, run {place} of {len(betas)}")
            _one(replace(config.each, kl_weight=beta, out=folder_of(out, beta)), samples, config.accept_changes)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"interrupted; the same command, with --out {shlex.quote(str(out))}, goes on"
        ) from error
    found = {beta: _read(folder) for beta, folder in sorted(_finished(out).items())}
    frontier = _frontier(samples, list(found), conditional)
    summary = {
        "reward": short(config.each.reward),
        "reward_pretrained": mean_and_error(samples.reward)[0],
        "reward_pretrained_se": mean_and_error(samples.reward)[1],
        "rows": [{"kl_weight": beta, **s} for beta, (s, _) in found.items()],
        "frontier": [_point(b) for b in frontier],
    }
    directory.write_summary(summary)
    show(summary)
    plot(summary, {beta: metrics for beta, (_, metrics) in found.items()}, frontier, directory.figure("frontier"))
    print(f"cost      {clock.in_words(clock.seconds(out))}")
    print(f"sweep     {out}")
    return summary


def _settings(config: Config) -> dict[str, Any]:
    """What must agree between two parts of a sweep: everything but the β's, the folder and the device."""
    settings = asdict(config.each)
    for name in (*OF_ONE_RUN, "out", "device"):
        del settings[name]
    return as_json(settings)


def _check_folder(directory: RunDirectory, config: Config) -> None:
    """Raise unless the folder is new, empty, or holds a sweep of the same options."""
    out, saved, asked = directory.path, directory.read_config(), _settings(config)
    if not (out / "config.json").is_file():
        directory.check(out)
        return
    if saved is None or saved.keys() != asked.keys():
        raise InvalidInputError(f"--out {out} holds something else than a sweep of this release; choose another --out")
    different = sorted(key for key in saved.keys() | asked.keys() if saved.get(key) != asked.get(key))
    if different:
        what = ", ".join(f"{key} was {saved.get(key)!r} and is {asked.get(key)!r}" for key in different)
        raise InvalidInputError(f"--out {out} holds a sweep of other options: {what}; choose another --out")


def _one(config: finetune_config.Config, pretrained: Evaluation, accept_changes: tuple[Change, ...]) -> None:
    """Run, go on, or leave alone what is finished."""
    assert config.out is not None
    if (config.out / "report.html").exists():
        print(f"finished  {config.out}")
    elif (config.out / "summary.json").exists() or RunDirectory(config.out).has_state:
        resume(config.out, accept_changes)
    else:
        there = {path.name.removesuffix(UNFINISHED) for path in config.out.glob("*")}
        if there <= LEFT_BY_AN_EARLY_END:
            with writing(config.out):
                shutil.rmtree(config.out, ignore_errors=not there)
        finetune.run(config, pretrained=pretrained)


def folder_of(out: Path, beta: float) -> Path:
    """The folder of the run at β: the one that holds it, or a new one whose name says β to the last digit."""
    for folder in sorted(out.glob("beta-*/")):
        if _beta(folder) == beta:
            return folder
    short = f"{beta:.6g}"
    folder = out / f"beta-{short if float(short) == beta else repr(float(beta))}"
    while _beta(folder) is not None:  # names used to be rounded
        folder = folder.with_name(folder.name + "-exact")
    return folder


def _beta(folder: Path) -> float | None:
    """The KL weight that a run's folder was begun with; None where it did not come that far."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8"))["kl_weight"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def _finished(out: Path) -> dict[float, Path]:
    """The folders of all finished runs by their β, those of earlier calls too."""
    folders = [path.parent for path in sorted(out.glob("beta-*/summary.json"))]
    return {beta: folder for folder in folders if (beta := _beta(folder)) is not None}


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The headline numbers of a run, and its metrics."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    kept = {key: summary.get(key) for name in KEPT for key in (name, f"{name}_se")}
    kept |= {"worse": summary.get("worse"), "stopped": summary.get("stopped")}
    kept["held_out_reward_before"] = summary["held_out_reward_before"]
    kept |= {"updates": summary["updates"], "seconds": summary["seconds"], "run": folder.name}
    return kept, RunDirectory(folder).read_metrics()


def _frontier(samples: Evaluation, betas: list[float], conditional: bool) -> tuple[Bound, ...]:
    """The optimum for each β, and for some in between, the weakest tilt first."""
    curve = np.geomspace(max(betas), min(betas), CURVE).tolist() if len(betas) > 1 else []
    return make_plan(samples, sorted({*betas, *curve}, reverse=True), conditional=conditional).bounds


def _point(b: Bound) -> dict[str, Any]:
    return {
        "kl_weight": b.beta,
        "reward": b.reward,
        "reward_se": b.reward_se,
        "path_kl": b.path_kl,
        "path_kl_se": b.path_kl_se,
        "trusted": b.trusted,
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table, all of it on the noise that the runs were judged on."""
    require("rich")
    from rich.console import Console
    from rich.table import Table

    rows = summary["rows"]
    before = number(rows[0]["reward_before"], rows[0]["reward_before_se"])
    table = Table(
        title=f"{summary['reward']} against path KL (pretrained reward {before})",
        caption="J is KL weight × path KL − reward, before training minus the pretrained reward. How far it "
        "fell and could have fallen, of which captured is the share, is known to the digits shown. Every ± is one "
        "standard error.",
    )
    for column in ("--kl-weight", "reward", "path KL (nats)", "J", "best J", "captured"):
        table.add_column(column, justify="right")
    weights = distinct([row["kl_weight"] for row in rows])
    for weight, row in zip(weights, rows):
        cells = [number(row[key], row[f"{key}_se"]) for key in ("reward_after", "path_kl")]
        cells += [
            beside(row[key], row.get(f"{of}_se")) for key, of in (("j_after", "j_fall"), ("j_bound", "j_possible"))
        ]
        table.add_row(weight, *cells, "J rose" if row["worse"] else percent(row["captured"], row["captured_se"]))
    for weight, row in zip(weights, rows):
        for sentence in opening(row):
            print(f"KL weight {weight}: {sentence}")
    Console().print(table)


@part("drawing")
def plot(
    summary: dict[str, Any], metrics: dict[float, list[dict[str, Any]]], frontier: Sequence[Bound], path: Path
) -> None:
    """The frontier with all runs, and reward and path KL over the updates, one colour per β."""
    require("matplotlib")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        rows = summary["rows"]
        shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(rows)))
        figure = canvas(7.6)
        axes = figure.subplot_mosaic([["top", "top"], ["reward", "kl"]], height_ratios=[3, 2])
        _draw_frontier(axes["top"], summary, frontier)
        weights = distinct([row["kl_weight"] for row in rows], 3)
        for weight, row, shade in zip(weights, rows, shades):
            style = {"xerr": 2 * row["path_kl_se"], "yerr": 2 * row["reward_gain_se"], "elinewidth": 1.3, "fmt": "D"}
            style |= {"color": shade, "markeredgecolor": "white", "zorder": 5}
            axes["top"].errorbar(row["path_kl"], row["reward_gain"], label=f"fine-tuned, β = {weight}", **style)
            base = {"held_out_reward": row["held_out_reward_before"], "held_out_path_kl": 0.0}
            for name, key in (("reward", "held_out_reward"), ("kl", "held_out_path_kl")):
                seen = [m for m in metrics[row["kl_weight"]] if m.get(key) is not None]
                values = [0.0, *(m[key] - base[key] for m in seen)]
                axes[name].plot([0, *(m["updates"] for m in seen)], values, "o-", ms=3, color=shade)
        legend_above(axes["top"], columns=2)
        axes["reward"].axhline(0.0, color=BEFORE, lw=1)
        axes["reward"].set(xlabel="updates", ylabel="reward gained, held out")
        axes["kl"].set(xlabel="updates", ylabel="path KL (nats), held out")
        save(figure, path)


def _draw_frontier(axes: Any, summary: dict[str, Any], found: Sequence[Bound]) -> None:
    """What can be had: the curve, and open circles where it rests on too few effective samples."""
    before, bounds = summary["reward_pretrained"], [b for b in found if b.path_kl > 0]
    if bounds:
        kl, knots = np.linspace(0, bounds[-1].path_kl, 300), bounds[:1]
        for b in bounds[1:]:  # the curve needs knots apart
            knots += [b] if b.path_kl > 1.001 * knots[-1].path_kl else []
        axes.plot(kl, tangent_curve(before, knots, kl) - before, color=BOUND, label="best possible")
    doubtful = [b for b in bounds if not b.trusted]
    if doubtful:
        points = [b.path_kl for b in doubtful], [b.reward - before for b in doubtful]
        axes.plot(*points, "o", ms=4.5, color=BOUND, markerfacecolor="white", label="rests on few samples")
    axes.plot([0], [0], "s", color=BEFORE, ms=8, label="pretrained")
    axes.set(xlabel="path KL to the pretrained model (nats)", ylabel="mean reward gained, on the same noise")
