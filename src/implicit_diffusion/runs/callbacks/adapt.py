"""A step size that follows θ: adapted during training, towards the acceptance at which a kernel works best.

A step size that was tuned to V_θ₀ no longer fits once training has narrowed the modes. After every update

    log h  ←  log h + γ_k (acceptance − target),        γ_k = max(k^{−2/3}, rate)

the stochastic approximation of Robbins and Monro (1951) as in Andrieu and Thoms, *A tutorial on adaptive MCMC* (2008),
algorithm 4. Its gain ends at `rate` instead of zero, since θ moves, and the root of the acceptance with it.

**What stays exact.** Each step is made with an h that was fixed before it, and MALA and HMC leave π_θ invariant for
every h. So for any sequence of h that is fixed in advance, the weights of particles are exact: their increments
V_{θ_k}(x) − V_{θ_{k+1}}(x) do not depend on h at all. Here h is fed back from the particles, as θ is, and the error is
of the same kind: one h serves all n particles, each particle changes it by O(γ_k/n), and estimates are consistent with
a bias of O(1/n). For constant θ and `rate=0`, adaptation dies out, which convergence of adaptive chains requires
(Roberts and Rosenthal, *Coupling and ergodicity of adaptive MCMC*, 2007).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from implicit_diffusion.errors import InvalidInputError, check_number
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.runs.state import Fit

DECAY = 2 / 3  # of the gain: Σ γ_k = ∞, Σ γ_k² < ∞
FURTHEST = math.log(1e6)  # log-ratio to the kernel's own step size: where V is flat, everything is accepted


@dataclass
class AdaptStep:
    """Callback: keep the acceptance of MALA or HMC at a target while θ moves; the step size goes into the metrics.

    The step size of the kernel, which may be a schedule, is multiplied by `loop.step_scale`, part of the loop's state.
    Without `fit`, call `adapt.move(loop, metrics)` after every `loop.step()`.

    Args:
        target: acceptance to aim at; by default the kernel's own, 0.574 for MALA (Roberts and Rosenthal, 1998) and 0.8
            for HMC.
        rate: the gain in the long run: log h follows a moving root in about 2/rate updates. With 0, it dies out.

    Raises:
        InvalidInputError: a target outside (0, 1), or a rate outside [0, 1]; when called, a kernel that never rejects.
    """

    target: float | None = None
    rate: float | int = 0.05
    moves: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.target is not None:
            self.target = check_number("target", self.target, 0.0, 1.0, note=", or None for the kernel's own")
        self.rate = check_number("rate", self.rate, 0.0, 1.0, closed=True)

    def __call__(self, fit: Fit) -> None:
        fit.metrics["step_size"] = self.move(fit.loop, fit.metrics)

    def move(self, loop: Loop, metrics: Mapping[str, Any]) -> float:
        """Adapt the step size to the metrics of the loop's last step; returns the one that it was made with."""
        kernel = loop.kernel if isinstance(loop, ParticleLoop) else None
        target = None if kernel is None else self.target if self.target is not None else kernel.target_acceptance
        if kernel is None or kernel.target_acceptance is None or target is None or "acceptance" not in metrics:
            raise InvalidInputError(
                f"AdaptStep: a {type(loop).__name__}{f' with {type(kernel).__name__}' if kernel else ''} reports no "
                "acceptance to aim at; use MALA or HMC"
            )
        assert isinstance(loop, ParticleLoop)
        used = loop.step_size
        self.moves += 1
        gain = max(self.moves**-DECAY, self.rate)
        log_scale = math.log(loop.step_scale) + gain * (float(metrics["acceptance"]) - target)
        loop.step_scale = math.exp(max(-FURTHEST, min(FURTHEST, log_scale)))
        return used

    def state_dict(self) -> dict[str, int]:
        """The number of updates so far; the step size belongs to the state of the loop."""
        return {"moves": self.moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""
        self.moves = state["moves"]
