"""summary.json of a comparison, as types."""

from __future__ import annotations

from dataclasses import dataclass

from implicit_diffusion.evaluation.chains import Estimate


@dataclass(frozen=True)
class Quality:
    """One method's gradients Γ at a fixed θ, beside the exact gradient g = ∇J. Each ± is a standard error.

    Args:
        bias: ⟨E Γ, g⟩/‖g‖² − 1: how much too long (or short) E Γ is along g.
        squared_bias: ‖E Γ − g‖²/‖g‖² in all directions; an unbiased estimate, which may be negative.
        variance: E‖Γ − E Γ‖²/‖g‖², of a gradient of one batch.
        cosine: mean cosine of the angle between Γ and g.
        seconds: of the processor, for one gradient.
        predicted_memory_bytes: states, activations and what trajectories carry back, at the fullest moment, by
            `loops.memory`; weights are not counted.
        evaluations: network calls × samples, for one gradient.
    """

    problem: str
    method: str
    bias: Estimate
    squared_bias: Estimate
    variance: float
    cosine: Estimate
    seconds: float
    predicted_memory_bytes: int
    evaluations: float


@dataclass(frozen=True)
class Point:
    """A moment of a training, judged on held-out noise.

    Args:
        evaluations: network calls × samples so far.
        seconds: of the processor so far; judging is not counted.
        updates: made so far.
        fall: of J, from before training to now, on the same noise.
        reward: E R.
        path_kl: in nats.
    """

    evaluations: int
    seconds: float
    updates: int
    fall: Estimate
    reward: float
    path_kl: float


@dataclass(frozen=True)
class Search:
    """The search of a method's one setting: a learning rate, the strength of guidance, or the M of best of M.

    Args:
        falls: of J at the end, by the setting; None where the training diverged.
        best: the setting with the largest.
        inside: whether the settings on both sides of it are worse, or there is none beyond it.
        evaluations: that the search took, which no curve counts.
    """

    falls: dict[str, float | None]
    best: float
    inside: bool
    evaluations: int


@dataclass(frozen=True)
class Reached:
    """What one method reached on one problem.

    Args:
        problem: its name.
        method: its name.
        search: of its setting.
        fall: of J at the end: mean over the seeds, with the errors of seeds and of held-out noise.
        captured: the same as a share of J before training less the bound J*.
        path_kl: in nats, at the end.
        evaluations: of a training.
        seconds: of a training.
        calls_per_sample: network calls that one sample takes from then on.
        diverged: number of seeds whose training diverged.
        curves: of the seeds that came through.
    """

    problem: str
    method: str
    search: Search
    fall: Estimate | None
    captured: Estimate | None
    path_kl: float | None
    evaluations: float
    seconds: float
    calls_per_sample: int
    diverged: int
    curves: list[list[Point]]


@dataclass(frozen=True)
class ProblemSummary:
    """One problem.

    Args:
        name: of it.
        beta: KL weight, one deviation of the pretrained reward per nat.
        before: J of the pretrained chain.
        best: the bound J*, below which no training goes.
    """

    name: str
    beta: float
    before: Estimate
    best: Estimate


@dataclass(frozen=True)
class Summary:
    """All of summary.json.

    Args:
        problems: that were compared on.
        gradients: every method's gradients, at a fixed θ.
        reached: what every method reached.
    """

    problems: list[ProblemSummary]
    gradients: list[Quality]
    reached: list[Reached]
