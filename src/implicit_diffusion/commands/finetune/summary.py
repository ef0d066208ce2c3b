"""summary.json: the headline numbers of a fine-tuning run, as a type, and to JSON and back.

An estimate has two keys in JSON, `name` and `name_se`; both are null where the number does not exist.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from implicit_diffusion.digits import Quality
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.evaluation.clipping import ClippingEffect
from implicit_diffusion.evaluation.plans import PlanRow


@dataclass(frozen=True)
class Headline:
    """What the judgement says: `evaluation.Judgement` in the words of a summary.

    Args:
        worse: sentences that say that J rose, by how much, and what to change; None where it did not.
        reward_before: of the pretrained chain.
        reward_after: of the trained chain.
        reward_gain: the paired difference of the two.
        reward_exported: of the exported pipeline.
        exported_less_after: the paired difference of exported and trained chain.
        reward_std_before: standard deviation of the reward between pretrained samples, under one condition.
        path_kl: of the trained chain, in nats.
        j_before: J of the pretrained chain.
        j_after: J of the trained chain.
        j_fall: the paired difference of the two.
        j_bound: J*.
        j_bound_from: the chain whose samples the bound is made of.
        j_possible: J_before − J*.
        captured: the share of the possible gain that was captured.
        captured_unknown: a sentence that says why the share is not known; None where it is.
    """

    worse: str | None
    reward_before: Estimate
    reward_after: Estimate
    reward_gain: Estimate
    reward_exported: Estimate
    exported_less_after: Estimate
    reward_std_before: float
    path_kl: Estimate | None
    j_before: Estimate | None
    j_after: Estimate | None
    j_fall: Estimate | None
    j_bound: Estimate | None
    j_bound_from: Literal["trained", "pretrained"] | None
    j_possible: Estimate | None
    captured: Estimate | None
    captured_unknown: str | None

    @property
    def gain_in_std(self) -> float:
        """Reward gained, in standard deviations of the pretrained reward between samples."""
        return self.reward_gain.mean / self.reward_std_before


@dataclass(frozen=True)
class TrainingSummary:
    """What the training did.

    Args:
        kl_weight: β at the end.
        kl_weight_at_start: β at the start.
        held_out_reward_before: mean reward of the pretrained chain on the noise of the held-out checks.
        seconds: in the steps of the loop.
        network_evaluations: of the training.
        updates: that were made.
        stopped: why the run stopped early; None where it did not.
        reached_target: whether it stopped since the path KL reached its target.
        kept: what was seen of an earlier model that was put back; None where none was.
        staleness_max: largest age of a gradient in the queue, in updates; None for the nested loop.
        predicted_memory_bytes: the prediction before the run.
    """

    kl_weight: float
    kl_weight_at_start: float
    held_out_reward_before: float
    seconds: float
    network_evaluations: int
    updates: int
    stopped: str | None
    reached_target: bool
    kept: dict[str, float | int] | None
    staleness_max: int | None
    predicted_memory_bytes: int


@dataclass(frozen=True)
class ModelSummary:
    """What was trained and exported.

    Args:
        condition: "prompts", "classes", or None.
        pipeline_class: name of the pipeline in diffusers; None where the parts alone decide.
        event_shape: of a sample of the chain.
        num_classes: of a class-conditional model.
        compiled: result of the compilation; None where none was asked for.
        adapter: how the exported adapter is loaded; None where all weights were trained.
        clipping: effect of switching `clip_sample` off; None where it was not on.
        pipeline: name of the chain that the exported pipeline runs.
        pipeline_is_the_chain: whether that is the chain that was trained.
    """

    condition: str | None
    pipeline_class: str | None
    event_shape: list[int]
    num_classes: int | None
    compiled: str | None
    adapter: str | None
    clipping: ClippingEffect | None
    pipeline: str
    pipeline_is_the_chain: bool


@dataclass(frozen=True)
class MemoryOfStart:
    """Share of the reward's variance that x_0 decides, with its standard error."""

    share: float
    se: float


@dataclass(frozen=True)
class Summary:
    """All of summary.json.

    Args:
        headline: what the judgement says.
        training: what the training did.
        model: what was trained and exported.
        memory_of_start: that of the plan.
        plan: the rows of the plan.
        quality_before: of the pretrained chain's samples, where they are digits.
        quality_after: of the trained chain's samples.
        quality_exported: of the exported pipeline's samples.
    """

    headline: Headline
    training: TrainingSummary
    model: ModelSummary
    memory_of_start: MemoryOfStart
    plan: list[PlanRow]
    quality_before: Quality | None
    quality_after: Quality | None
    quality_exported: Quality | None

    def to_json(self) -> dict[str, Any]:
        """One flat mapping of the parts' fields; estimates as two numbers."""
        looks = {"before": self.quality_before, "after": self.quality_after, "exported": self.quality_exported}
        content = to_json(self.headline) | to_json(self.training) | to_json(self.model)
        content |= {"memory_of_start": asdict(self.memory_of_start), "plan": [asdict(row) for row in self.plan]}
        content |= {f"quality_{when}": quality and asdict(quality) for when, quality in looks.items()}
        for when in ("before", "after"):
            quality = looks[when]
            if quality is not None:
                content[f"classifier_confidence_{when}"] = quality.classifier_confidence
                content[f"class_histogram_{when}"] = quality.class_histogram
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Summary:
        """The summary that `to_json` made `content` of.

        Raises:
            KeyError: a field is missing.
        """
        looks = (f"quality_{when}" for when in ("before", "after", "exported"))
        return Summary(
            from_json(Headline, content),
            from_json(TrainingSummary, content),
            from_json(ModelSummary, content),
            from_json(MemoryOfStart, content["memory_of_start"]),
            [from_json(PlanRow, row) for row in content["plan"]],
            *(_value(Quality, content[look]) for look in looks),
        )


def to_json(part: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain values, each estimate as two numbers."""
    content: dict[str, Any] = {}
    hints = get_type_hints(type(part))
    for field in fields(part):
        value = getattr(part, field.name)
        if _without_none(hints[field.name]) is Estimate:
            content[field.name], content[f"{field.name}_se"] = value or (None, None)
        else:
            content[field.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return content


def from_json(kind: Any, content: Mapping[str, Any]) -> Any:
    """A dataclass of type `kind` from a mapping that has at least its fields, as `to_json` writes them.

    Raises:
        KeyError: a field is missing.
    """
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if _without_none(hint) is Estimate:
            mean = content[name]
            values[name] = None if mean is None else Estimate(mean, content[f"{name}_se"])
        else:
            values[name] = _value(hint, content[name])
    return kind(**values)


def _value(hint: Any, value: Any) -> Any:
    """A value that may be a dataclass."""
    hint = _without_none(hint)
    return from_json(hint, value) if is_dataclass(hint) and value is not None else value


def _without_none(hint: Any) -> Any:
    """X for `X | None`."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (other,) = (each for each in get_args(hint) if each is not types.NoneType)
    return other
