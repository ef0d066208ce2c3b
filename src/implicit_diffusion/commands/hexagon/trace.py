"""What is recorded of one run of one arm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
        seconds: spent sampling and training.
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

    def record(
        self,
        steps: Iterator[tuple[dict[str, Any], Float[Tensor, "n 2"]]],
        total: int,
        logits: Callable[[], Float[Tensor, " modes"]],
    ) -> None:
        """Run `total` steps; keep a hundred records, three clouds of particles and the rewards of the last tenth.

        Args:
            steps: makes a step when it is asked for its metrics and the particles after it.
            total: their number.
            logits: θ as it is, in memory of its own.
        """
        due = {round(total * (i + 1) / RECORDS) for i in range(RECORDS)}
        start, clouds = time.perf_counter(), (1, (total + 1) // 2, total)
        for k, (metrics, x) in enumerate(steps, 1):
            self.seconds += time.perf_counter() - start
            if k > total - max(1, total // 10):
                self.tail.append(float(metrics["reward"]))
            if k in due:
                point = finite({name: float(metrics[name]) for name in METRICS if name in metrics})
                self.history.append(x[:FOLLOWED, 0].detach().clone())
                self.points.append({"iteration": k, "seconds": self.seconds} | point)
                self.path.append(logits())
            if k in clouds:
                self.clouds.append((x.detach().clone(), logits()))
            start = time.perf_counter()


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
