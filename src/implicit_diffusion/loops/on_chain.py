"""What the loops over denoising chains share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, trying
from implicit_diffusion.gradients.half import computes_in_float16
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import GibbsObjective, Objective, TerminalObjective
from implicit_diffusion.samplers.chain import Chain

TRIAL = 2**31  # trajectory on which a loop tries chain and objective; no run injects so many
HALF = "; the network computes in float16, which ends at 65504: use `precision=torch.bfloat16`, or float32"


class ChainLoop(Loop):
    """A loop over the trajectories of a chain.

    Args:
        chain: the sampler, whose denoiser is trained in place.
        objective: F, e.g. `Reward(r) + beta * PathKL()`.
        update: a torch optimizer, or an `Update` around one.
        batch: trajectories injected together (B).
        noise: source of every random number.

    Raises:
        InvalidInputError: a batch below one; an optimizer that does not move the denoiser; an objective that cannot be
            differentiated on samples of the chain, has no finite value on its rows, or needs a density.
    """

    def __init__(
        self,
        chain: Chain,
        objective: Objective,
        update: Update | torch.optim.Optimizer,
        *,
        batch: int,
        noise: Noise,
    ) -> None:
        batch = check_integer("batch", batch)
        check_type("chain", chain, Chain, "take Chain(denoiser, table, event_shape); a potential is trained by Single")
        super().__init__(chain.denoiser, "denoiser", objective, update, noise)
        self.chain, self.batch = chain, batch
        self.update.advice = HALF if computes_in_float16(chain.denoiser) else ""
        for _, cost in objective.running:
            cost.check(chain.table, chain.trained_rows)
        shape = (2, *chain.event_shape)
        with trying("denoiser", f"states of shape {shape}"):
            trial = chain.endpoint(chain.sample(noise, 2, TRIAL), noise, TRIAL)
        for weight, term in objective.terms:
            if isinstance(term, TerminalObjective):
                with trying(term.name, f"samples of shape {shape}"):
                    term.check_value(trial)
                    term.check_slope(trial)
            elif isinstance(term, GibbsObjective) and weight != 0:
                raise InvalidInputError(
                    f"{type(term).__name__} needs the density of the samples, which a denoising chain does not have; "
                    "on a chain take PathKL to stay near the pretrained model, MMD or Sinkhorn to approach data"
                )
        chain.evaluations = 0
        self.injected = 0  # trajectories begun

    def _words(self) -> Iterable[str]:
        return f"batch={self.batch}", *super()._words()

    def _parts(self) -> dict[str, object]:
        return {"chain": self.chain} | super()._parts()

    def cost(self) -> dict[str, int]:
        return {"network_evaluations": self.chain.evaluations}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"injected": self.injected, "evaluations": self.chain.evaluations}

    def _like(self) -> dict[str, Any]:
        chain = {"steps": self.chain.num_steps, "event_shape": list(self.chain.event_shape)}
        return super()._like() | {"batch": self.batch} | chain

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.injected, self.chain.evaluations = state["injected"], state["evaluations"]
