"""The nested loop: run the sampler to its end, differentiate, update, start again."""

from __future__ import annotations

from typing import Any

import torch

from implicit_diffusion import processes
from implicit_diffusion.denoisers.sharded import is_sharded
from implicit_diffusion.gradients import Estimator
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.samplers.chain import Chain


class Nested(ChainLoop):
    """B fresh trajectories per step: with the adjoint, N network calls forward and N with gradient per update.

    Args:
        chain: the sampler, whose denoiser is trained in place.
        objective: F, e.g. `Reward(r) + beta * PathKL()`.
        update: a torch optimizer, or an `Update` around one.
        batch: samples per step (B).
        noise: source of every random number.
        estimator: of the gradient of one batch of trajectories; the exact adjoint, `Adjoint()`, if None.

    Raises:
        InvalidInputError: arguments that do not fit together, as in `ChainLoop`.
    """

    def __init__(
        self,
        chain: Chain,
        objective: Objective,
        update: Update | torch.optim.Optimizer,
        *,
        batch: int,
        noise: Noise,
        estimator: Estimator | None = None,
    ) -> None:
        super().__init__(chain, objective, update, batch=batch, noise=noise, estimator=estimator, stride=None)

    @processes.sharing()
    def step(self) -> dict[str, Any]:
        self.iteration += 1
        self.update.begin()
        values, made, measured = self.estimator.gradient(
            self.chain, self.objective, self.noise, self.batch, self.injected
        )
        self.evaluations += made
        info = self.update.step(list(values.values()), lambda: self._why(self._diagnose(), values))
        self.injected += 1
        return self._metrics(values) | dict(measured) | info

    def _diagnose(self) -> str | None:
        """Replay this process's trajectory, whose noise is addressed by its number, up to the first bad state."""
        if is_sharded(self.chain.denoiser):  # all processes must call it equally often, and this may end in one of them
            return None
        for stage, x in enumerate(self.chain.trajectory(self.noise, self.batch, self.injected)):
            if not x.isfinite().all():
                return (
                    f"iteration {self.iteration}: states x_{stage} of trajectory {self.injected} hold NaN or infinity"
                )
        return None
