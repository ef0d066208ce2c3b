"""What others do with rewards of any kind: policy gradients with standardised advantages, several updates per batch.

For a batch of trajectories drawn under θ_old, in groups of samples,

    A_i = σ (mean_group R − R_i)/std_group R,
    Γ = ∇_θ (1/B) Σ_i Σ_k max(ρ A, clip(ρ, 1 − ε, 1 + ε) A) + β ∇_θ Σ_k mean c_k

is followed `INNER` times, with ρ_k the ratio of the present density of x_{k+1} to that under θ_old. Ratio, clip and the
gradient of the penalty are those of `ScoreFunction`. The advantage differs: it is divided by a deviation, and it is the
same on all rows, without the costs of later ones. σ, the deviation of the pretrained reward, keeps the scale of β.

    DDPO    one group, the whole batch. Black, Janner, Du, Kostrikov and Levine, arXiv 2305.13301.
    GRPO    groups of `GROUP` samples from the same x_0. Shao et al., arXiv 2402.03300; on flows and diffusion: Liu et
            al., arXiv 2505.05470; Xue et al., arXiv 2505.07818.

Simplified: DDPO has the penalty as well, since J contains it (as in DPOK, Fan et al., arXiv 2305.16381). Its statistics
are those of one batch, not of each prompt's history. An update uses the whole batch and all rows. The clip is on the
density of a row, while the authors' programs average log-densities over pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.gradients import ScoreFunction
from implicit_diffusion.gradients.estimator import Carry, Pulled, RowStates
from implicit_diffusion.loops import Nested, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain

GROUP, INNER = 4, 2


class SharedStart(Chain):
    """A chain whose samples come in groups of `GROUP` from the same x_0."""

    def initial(self, noise: Noise, batch: int, index: int = 0) -> Float[Tensor, "batch *event"]:
        """x_0 of trajectory `index`, every one `GROUP` times; a batch that is no multiple has a smaller last group."""
        return super().initial(noise, -(-batch // GROUP), index).repeat_interleave(GROUP, 0)[:batch]


class Standardised(ScoreFunction):
    """The score function with advantages in deviations of their group, times `scale`.

    Args:
        scale: σ.
        group: number of neighbouring samples that make a group; all of the batch if None.
    """

    def __init__(self, scale: float, group: int | None = None) -> None:
        super().__init__()
        self.scale, self.group = scale, group

    def turn(self, objective: Objective, end: Particles) -> tuple[Carry, dict[str, Float[Tensor, ""]]]:
        """A, on the scale on which `ScoreFunction` subtracts the mean of the others, which here is −A/(B − 1)."""
        carry, values = super().turn(objective, end)
        costs: Tensor = processes.gathered(carry["go"])
        grouped = costs.unflatten(0, (-1, self.group or len(costs)))
        off = grouped - grouped.mean(1, keepdim=True)
        advantage = (self.scale * off / (off.square().mean(1, keepdim=True).sqrt() + 1e-6 * self.scale)).flatten()
        return {**carry, "go": processes.share(advantage * (len(costs) - 1) / len(costs))}, values

    def pull(self, chain: Chain, objective: Objective, at: RowStates, carry: Carry) -> Pulled:
        """The same advantage for the row before."""
        pulled = super().pull(chain, objective, at, carry)
        return pulled._replace(carry={**pulled.carry, "go": carry["go"]})


class Reusing(Nested):
    """`Nested` with `INNER` updates from every batch of trajectories."""

    estimator: Standardised

    def __init__(
        self,
        chain: Chain,
        objective: Objective,
        update: Update,
        *,
        batch: int,
        noise: Noise,
        estimator: Standardised,
    ) -> None:
        super().__init__(chain, objective, update, batch=batch, noise=noise, estimator=estimator)

    @processes.sharing()
    def step(self) -> dict[str, Any]:
        self.iteration += 1
        chain, index = self.chain, self.injected
        states = chain.trajectory(self.noise, self.batch, index)
        self.evaluations += chain.num_steps * self.batch
        with torch.no_grad():
            turned, values = self.estimator.turn(self.objective, Particles(states[-1]))
        info: dict[str, Any] = {}
        for _ in range(INNER):
            self.update.begin()
            carry = {name: part[None] for name, part in turned.items()}
            with chain.evaluating():
                for row in reversed(range(chain.num_steps)):
                    at = RowStates(states[row][None], [row], [index], self.noise)
                    carry, _, made, _ = self.estimator.pull(chain, self.objective, at, carry)
                    self.evaluations += made
            info = self.update.step(list(values.values()), lambda: self._why(self._diagnose(), values))
        self.injected += 1
        return self._metrics(values) | info


def shared_start(chain: Chain) -> SharedStart:
    """The same chain, with the same networks, in groups."""
    return SharedStart(
        chain.denoiser,
        chain.table,
        chain.event_shape,
        reference=chain.reference,
        pretrained_rows=chain.pretrained_rows,
    )
