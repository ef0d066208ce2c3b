"""summary.json: the headline numbers of a fine-tuning run, as a type, and to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from implicit_diffusion.commands.finetune.by_weights import ByWeights
from implicit_diffusion.commands.finetune.held_out_prompts import HeldOutPrompts
from implicit_diffusion.commands.shared.summaries import from_json, part_from_json, to_json
from implicit_diffusion.digits import Quality
from implicit_diffusion.evaluation.chains import Estimate
from implicit_diffusion.evaluation.clipping import ClippingEffect
from implicit_diffusion.evaluation.judging import Untrained
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
        j_fall: the paired difference of the chain that training began with and the trained one.
        j_bound: J*.
        j_bound_from: the chain whose samples the bound is made of.
        j_possible: J of the chain that training began with, less J*.
        captured: the share of the possible gain that was captured.
        captured_unknown: a sentence that says why the share is not known; None where it is.
        untrained: the chain that training began with; None where that is the pretrained chain.
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
    untrained: Untrained | None

    @property
    def j_begun(self) -> Estimate | None:
        """J of the chain that training began with."""
        return self.j_before if self.untrained is None else self.untrained.j

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
        held_out_rewards_before: of each reward, as `held_out_reward_before`.
        estimator: of the gradient, by its name on the command line.
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
    estimator: str
    held_out_rewards_before: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ModelSummary:
    """What was trained and exported.

    Args:
        condition: "prompts", "classes", or None.
        pipeline_class: name of the pipeline in diffusers; None where the parts alone decide, or there is none.
        event_shape: of a sample of the chain.
        num_classes: of a class-conditional model.
        compiled: result of the compilation; None where none was asked for.
        adapter: how the exported adapter is loaded; None where all weights were trained.
        adapter_comfyui: name of the file that holds it for ComfyUI; None where there is none.
        clipping: effect of switching `clip_sample` off; None where it was not on.
        pipeline: name of the chain that the exported model runs.
        pipeline_is_the_chain: whether that is the chain that was trained.
        factory: FILE.py:function that makes the network; None for a pipeline of diffusers.
        video: whether the exported pipeline makes videos.
    """

    condition: str | None
    pipeline_class: str | None
    event_shape: list[int]
    num_classes: int | None
    compiled: str | None
    adapter: str | None
    adapter_comfyui: str | None
    clipping: ClippingEffect | None
    pipeline: str
    pipeline_is_the_chain: bool
    factory: str | None
    video: bool = False


@dataclass(frozen=True)
class MemoryOfStart:
    """Share of the reward's variance that x_0 decides, with its standard error."""

    share: float
    se: float


@dataclass(frozen=True)
class RewardSummary:
    """One of several rewards, or the only one, in its own units: `evaluation.RewardJudgement` by name.

    Args:
        name: short, for people.
        weight: in the weighted sum.
        deviation: standard deviation between pretrained samples, under one condition.
        before: of the pretrained chain.
        after: of the trained chain.
        gain: the paired difference of the two.
        exported: of the exported pipeline.
        expected: the gain under the law that is best for the weighted sum; None without a bound.
        captured: the share of the expected gain; None where it means nothing.
    """

    name: str
    weight: float
    deviation: float
    before: Estimate
    after: Estimate
    gain: Estimate
    exported: Estimate
    expected: Estimate | None
    captured: Estimate | None

    @property
    def gain_in_std(self) -> float:
        """Reward gained, in deviations."""
        return self.gain.mean / self.deviation


@dataclass(frozen=True)
class Look:
    """What a judge said during the run, on held-out noise.

    Args:
        updates: that had been made.
        change: of the mean, from the pretrained chain on the same noise.
        se: its standard error.
    """

    updates: int
    change: float
    se: float


@dataclass(frozen=True)
class JudgeSummary:
    """One judge, a function that was measured and never raised.

    Args:
        name: short, for people.
        deviation: standard deviation between pretrained samples.
        before: of the pretrained chain.
        after: of the trained chain.
        change: the paired difference of the two.
        exported: of the exported pipeline.
        course: what it said during the run.
        best_update: after which it was highest; None where it was never asked during the run.
        warned: update after which it had first clearly fallen; None where it never had.
        fell: whether it has clearly fallen at the end.
    """

    name: str
    deviation: float
    before: Estimate
    after: Estimate
    change: Estimate
    exported: Estimate
    course: list[Look]
    best_update: int | None
    warned: int | None
    fell: bool

    @property
    def change_in_std(self) -> float | None:
        """The change, in deviations; None where pretrained samples do not differ."""
        return self.change.mean / self.deviation if self.deviation > 0 else None


@dataclass(frozen=True)
class Summary:
    """All of summary.json.

    Args:
        headline: what the judgement says.
        by_weights: what the weights of the judged trajectories add to it.
        training: what the training did.
        model: what was trained and exported.
        memory_of_start: that of the plan.
        plan: the rows of the plan.
        quality_before: of the pretrained chain's samples, where they are digits.
        quality_after: of the trained chain's samples.
        quality_exported: of the exported pipeline's samples.
        rewards: each reward by itself.
        judges: each judge by itself.
        held_out_prompts: what was gained under prompts that were not trained on; None where there are none.
    """

    headline: Headline
    by_weights: ByWeights
    training: TrainingSummary
    model: ModelSummary
    memory_of_start: MemoryOfStart
    plan: list[PlanRow]
    quality_before: Quality | None
    quality_after: Quality | None
    quality_exported: Quality | None
    rewards: list[RewardSummary] = field(default_factory=list)
    judges: list[JudgeSummary] = field(default_factory=list)
    held_out_prompts: HeldOutPrompts | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat mapping of the parts' fields; estimates as two numbers."""
        looks = {"before": self.quality_before, "after": self.quality_after, "exported": self.quality_exported}
        content: dict[str, Any] = to_json(self.headline) | to_json(self.by_weights)
        content |= to_json(self.training) | to_json(self.model)
        content |= {"memory_of_start": to_json(self.memory_of_start), "plan": to_json(self.plan)}
        content |= {"rewards": to_json(self.rewards), "judges": to_json(self.judges)}
        content |= {"held_out_prompts": to_json(self.held_out_prompts)}
        content |= {f"quality_{when}": to_json(quality) for when, quality in looks.items()}
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
            TypeError: a field of a part is missing, or one that the part does not have.
        """
        before, after, exported = (content[f"quality_{when}"] for when in ("before", "after", "exported"))
        return Summary(
            part_from_json(Headline, content),
            part_from_json(ByWeights, content),
            part_from_json(TrainingSummary, content),
            part_from_json(ModelSummary, content),
            from_json(MemoryOfStart, content["memory_of_start"]),
            from_json(list[PlanRow], content["plan"]),
            from_json(Quality | None, before),
            from_json(Quality | None, after),
            from_json(Quality | None, exported),
            from_json(list[RewardSummary], content["rewards"]),
            from_json(list[JudgeSummary], content["judges"]),
            from_json(HeldOutPrompts | None, content["held_out_prompts"]),
        )
