"""What a fine-tuning run leaves behind for its report, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.finetune.plan import Plan
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import Bound
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.named import NAMED_SAMPLERS

JUDGED = "judged"  # folder of what a report needs beside the JSON files


@dataclass(frozen=True, repr=False)
class Outcome(Shown):
    """All that a report shows.

    Args:
        config: the resolved configuration, config.json.
        summary: the headline numbers, summary.json; a number that does not exist (a path KL without noise) is None.
        plan: what each β could buy.
        before: the pretrained chain on held-out noise.
        after: the fine-tuned chain on the same noise.
        bound: J* and the law that attains it; None where the objective has no path KL.
        metrics: the lines of metrics.jsonl, one per update.
        decoded: images before and after where these are not the samples: of the first starts where those are latents;
            of every start where the outcome was read from disk.
    """

    config: dict[str, Any]
    summary: dict[str, Any]
    plan: Plan
    before: Evaluation
    after: Evaluation
    bound: Bound | None
    metrics: list[dict[str, Any]]
    decoded: tuple[Tensor, Tensor] | None = None

    @property
    def images(self) -> tuple[Tensor, Tensor] | None:
        """Images before and after from the same noise, each of shape (n, C, H, W); None where samples are none."""
        if self.decoded is not None or self.before.samples.ndim != 5:
            return self.decoded
        return self.before.samples[:, 0], self.after.samples[:, 0]

    @property
    def beta(self) -> float:
        """The weight β at the end of the run."""
        return float(self.summary.get("kl_weight", self.config["kl_weight"]))

    @property
    def drift(self) -> bool:
        """Whether β weighs the distance of the drifts, so that neither a path KL nor J has a place in the report."""
        return self.config.get("penalty") == "drift"

    @property
    def adapted(self) -> bool:
        """Whether β moved during the run, so that config.json, which says where it began, and `beta` differ."""
        return self.beta != self.config["kl_weight"]

    @property
    def chain(self) -> str:
        """The chain in words, such as "10 DDPM steps"."""
        return f"{self.config['num_steps']} {NAMED_SAMPLERS[self.config['scheduler']].words} steps"

    @property
    def gain_in_std(self) -> float:
        """Reward gained, in standard deviations of the pretrained reward between samples, those of the same noise."""
        gained = float(self.summary["reward_after"] - self.summary["reward_before"])
        return gained / float(self.summary.get("reward_std_before") or self.plan.reward_std)

    def column(self, name: str, *others: str) -> list[tuple[float, ...]]:
        """Rows (name, *others) of the updates that report all of them."""
        wanted = (name, *others)
        return [tuple(float(m[n]) for n in wanted) for m in self.metrics if all(m.get(n) is not None for n in wanted)]


def outside(images: Tensor, margin: float = 0.1) -> float:
    """Share of pixels outside [-1, 1] by more than `margin`, which an image file cannot show."""
    return (images.abs() > 1 + margin).to(torch.float64).mean().item()


def keep_outcome(outcome: Outcome, directory: RunDirectory) -> None:
    """Write what the JSON files of a run lack for its report: rewards, path KLs and images, not all the samples."""
    sides = {
        side: {name: getattr(found, name) for name in ("reward", "path_kl", "log_ratio")}
        for side, found in (("before", outcome.before), ("after", outcome.after))
    }
    plan = asdict(outcome.plan)
    bound = None if outcome.bound is None else asdict(outcome.bound)
    save_state(directory.path / JUDGED, {**sides, "images": outcome.images, "plan": plan, "bound": bound})


def read_outcome(directory: RunDirectory) -> Outcome:
    """The outcome of a finished run, on the CPU.

    Raises:
        InvalidInputError: a run that is not finished, or of a release that kept less.
    """
    path = directory.path
    if not (path / "summary.json").is_file():
        raise InvalidInputError(f"{path} is not finished: it has no summary.json; `resume` goes on with it")
    kept = load_state(path / JUDGED)
    config = directory.read_config() or {}
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    plan = kept["plan"] | {"bounds": tuple(Bound(**bound) for bound in kept["plan"]["bounds"])}
    before, after = (
        Evaluation(**kept[side], samples=kept[side]["reward"][..., None][..., :0]) for side in ("before", "after")
    )
    bound = None if kept["bound"] is None else Bound(**kept["bound"])
    return Outcome(config, summary, Plan(**plan), before, after, bound, directory.read_metrics(), kept["images"])
