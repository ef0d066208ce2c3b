"""What a fine-tuning run leaves behind for its report, in memory and on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.summary import Summary
from implicit_diffusion.commands.shared.pictures import PLANE
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.evaluation.plans import Plan
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.judges import COURSE
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.named import NAMED_SAMPLERS

JUDGED = "judged"  # folder of what a report needs beside the JSON files


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """All that a report shows.

    Args:
        config: the resolved options, config.json.
        summary: the headline numbers, summary.json.
        plan: what each β could buy.
        before: evaluation of the pretrained chain on held-out noise.
        after: evaluation of the fine-tuned chain on the same noise.
        bound: J* and the law that attains it; None where the objective has no path KL.
        metrics: the lines of metrics.jsonl, one per update.
        decoded: images before and after where these are not the samples: images of the first starts where samples are
            latents; images or points of every start where the result was read from disk.
        course: 8-bit images of the same noise, (n, C, H, W), by the updates before them; empty without a judge.
    """

    config: Config
    summary: Summary
    plan: Plan
    before: Evaluation
    after: Evaluation
    bound: Bound | None
    metrics: list[dict[str, Any]]
    decoded: tuple[Tensor, ...] | None = None
    course: dict[int, Tensor] = field(default_factory=dict)

    @property
    def shown(self) -> tuple[Tensor, ...] | None:
        """Samples before and after from the same noise, decoded; None where they are neither images nor points."""
        if self.decoded is not None:
            return self.decoded
        if self.before.samples.ndim != 5 and self.before.samples.shape[2:] != PLANE:
            return None
        return self.before.samples[:, 0], self.after.samples[:, 0]

    @property
    def images(self) -> tuple[Tensor, ...] | None:
        """Images before and after from the same noise, of shape (n, C, H, W); None where samples are not images."""
        return self.shown if self.shown is not None and self.shown[0].ndim == 4 else None

    @property
    def points(self) -> tuple[Tensor, ...] | None:
        """Points of the plane before and after from the same noise, of shape (n, 2); None where samples are not."""
        return self.shown if self.shown is not None and self.shown[0].shape[1:] == PLANE else None

    @property
    def beta(self) -> float:
        """The weight β at the end of the run."""
        return self.summary.training.kl_weight

    @property
    def drift(self) -> bool:
        """Whether β weighs the distance of the drifts, so that neither a path KL nor J has a place in the report."""
        return self.config.penalty == "drift"

    @property
    def adapted(self) -> bool:
        """Whether β moved during the run."""
        return self.beta != self.summary.training.kl_weight_at_start

    @property
    def chain(self) -> str:
        """The chain in words, such as "10 DDPM steps"."""
        return chain_in_words(self.config, self.summary.model.pipeline)

    def column(self, name: str, *others: str) -> list[tuple[float, ...]]:
        """Rows (name, *others) of the updates that report all of them."""
        wanted = (name, *others)
        return [tuple(float(m[n]) for n in wanted) for m in self.metrics if all(m.get(n) is not None for n in wanted)]


def chain_in_words(config: Config, table: str) -> str:
    """The chain of a run, such as "10 DDPM steps"; a table of one's own by its name."""
    if config.scheduler is None:
        return f"{config.num_steps} steps of {table}"
    return f"{config.num_steps} {NAMED_SAMPLERS[config.scheduler].words} steps"


def outside(images: Tensor, margin: float = 0.1) -> float:
    """Share of pixels outside [-1, 1] by more than `margin`, which an image file cannot show."""
    return (images.abs() > 1 + margin).to(torch.float64).mean().item()


def keep_result(result: Result, directory: RunDirectory) -> None:
    """Write what the JSON files of a run lack for its report: rewards, path KLs and images, but not all samples."""
    sides = {
        side: {name: getattr(evaluation, name) for name in ("reward", "path_kl", "log_ratio", "rewards")}
        for side, evaluation in (("before", result.before), ("after", result.after))
    }
    bound = None if result.bound is None else asdict(result.bound)
    state = {**sides, "images": result.shown, "plan": result.plan.state_dict(), "bound": bound}
    directory.save_part(JUDGED, state)


def read_result(directory: RunDirectory) -> Result:
    """The result of a finished run, on the CPU.

    Raises:
        InvalidInputError: the run is not finished, or of a release that kept other numbers, or they are damaged.
    """
    path = directory.path
    if not (path / "summary.json").is_file():
        raise InvalidInputError(f"{path} is not finished: it has no summary.json; `resume` continues it")
    try:
        kept = directory.load_part(JUDGED)
    except InvalidInputError as error:
        again = f"remove {path}/summary.json, and {directory.resume_command} judges the run again"
        raise InvalidInputError(f"{error}; {again}") from error
    before, after = (
        Evaluation(**kept[side], samples=kept[side]["reward"][..., None][..., :0]) for side in ("before", "after")
    )
    bound = None if kept["bound"] is None else Bound(**kept["bound"])
    try:
        plan = Plan.from_state(kept["plan"])
    except (KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} was written by another release: its plan has other fields") from error
    config, metrics = read_options(Config, directory), directory.read_metrics()
    return Result(
        config, read_run_summary(path), plan, before, after, bound, metrics, kept["images"], _course(directory)
    )


def _course(directory: RunDirectory) -> dict[int, Tensor]:
    """The images that the judges have seen during the run."""
    looks = sorted(int(folder.name) for folder in (directory.path / COURSE).glob("[0-9]*") if folder.name.isdecimal())
    return {updates: directory.load_part(f"{COURSE}/{updates}")["images"] for updates in looks}


def read_run_summary(path: Path) -> Summary:
    """The summary.json in the folder of a finished run.

    Raises:
        InvalidInputError: it is not of this release.
    """
    try:
        return Summary.from_json(read_json(path / "summary.json"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(f"{path}/summary.json is not of this release: {error!r}") from error
