"""What is recorded of one run of one arm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.commands.shared.hexagon_problem import mixture, smooth_reward
from implicit_diffusion.potentials import GaussianMixture, Guided
from implicit_diffusion.showing import Shown

RECORDS = 100
FOLLOWED = 128  # particles whose mixing is looked at
METRICS = ("reward", "gradient_evaluations", "lag", "ess", "log_z", "grad_norm")  # that are recorded


@dataclass(repr=False)
class Trace(Shown):
    """One run of one arm.

    Args:
        arm: its name.
        seed: of its noise.
        potential: the final one.
        points: lines of metrics.jsonl, one per record.
        path: θ, one per record.
        clouds: particles at the beginning, half-way and at the end, with θ there.
        seconds: spent sampling and training; its share where runs step together.
        tail: rewards of the last tenth of the iterations.
        history: first coordinate of some particles, one row per record.
        diagnostics: of the loop at the end, and of the second half of the history.
        advice: what they say, in words.
    """

    arm: str
    seed: int
    potential: nn.Module
    points: list[dict[str, Any]] = field(default_factory=list)
    path: list[Float[Tensor, " modes"]] = field(default_factory=list)
    clouds: list[tuple[Float[Tensor, "n 2"], Float[Tensor, " modes"]]] = field(default_factory=list)
    seconds: float = 0.0
    tail: list[float] = field(default_factory=list)
    history: list[Float[Tensor, " few"]] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """All that summary, figures and later arms need, as `save_state` keeps it; `load` is the way back."""
        kept = ("arm", "seed", "points", "clouds", "seconds", "tail", "diagnostics", "advice")
        return {name: getattr(self, name) for name in kept} | {"logits": logits_of(self.potential).detach()}

    @classmethod
    def load(cls, state: dict[str, Any], sigma: float, guidance: float) -> Trace:
        """The trace of a state.

        Args:
            state: from `state_dict`.
            sigma: deviation of the Gaussians.
            guidance: strength of the guidance arm.
        """
        values = {name: value for name, value in state.items() if name != "logits"}
        return cls(potential=potential_of(values["arm"], state["logits"], sigma, guidance), **values)


Now = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # of every run, its particles and its θ, in memory of its own


def record(traces: Sequence[Trace], steps: Iterator[tuple[dict[str, Any], Now]], total: int) -> None:
    """Run `total` steps of all traces; keep a hundred records, three clouds of particles, rewards of the last tenth.

    Args:
        traces: of the runs that step together. Each counts its share of the seconds.
        steps: makes a step when it is asked for its metrics, one number or one for each run, and what is there now.
        total: their number.
    """
    due = {round(total * (i + 1) / RECORDS) for i in range(RECORDS)}
    start, seconds, clouds = time.perf_counter(), 0.0, (1, (total + 1) // 2, total)

    def column(value: Any) -> list[float]:
        numbers: list[float] = torch.as_tensor(value, dtype=torch.float64).expand(len(traces)).tolist()
        return numbers

    for k, (metrics, now) in enumerate(steps, 1):
        seconds += (time.perf_counter() - start) / len(traces)
        if k > total - max(1, total // 10):
            for trace, reward in zip(traces, column(metrics["reward"]), strict=True):
                trace.tail.append(reward)
        if k in due or k in clouds:
            columns = {name: column(metrics[name]) for name in METRICS if name in metrics}
            for s, (trace, (x, logits)) in enumerate(zip(traces, now(), strict=True)):
                if k in due:
                    point = finite({name: values[s] for name, values in columns.items()})
                    trace.history.append(x[:FOLLOWED, 0].detach().clone())
                    trace.points.append({"iteration": k, "seconds": seconds} | point)
                    trace.path.append(logits)
                if k in clouds:
                    trace.clouds.append((x.detach().clone(), logits))
        start = time.perf_counter()
    for trace in traces:
        trace.seconds = seconds


def potential_of(
    arm: str, logits: Float[Tensor, " modes"] | None, sigma: float, guidance: float
) -> GaussianMixture | Guided:
    """V of an arm at θ = logits, or at θ_0 without them."""
    potential = mixture(logits, sigma)
    return Guided(potential, smooth_reward, guidance) if arm == "guidance" else potential


def logits_of(potential: nn.Module) -> Float[Tensor, " modes"]:
    """θ of a mixture, guided or not."""
    unguided = potential.potential if isinstance(potential, Guided) else potential
    assert isinstance(unguided, GaussianMixture)
    return unguided.logits


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """Without NaN and infinity, which a saturated θ or too few particles leave as ratios of zeros: JSON has neither."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
