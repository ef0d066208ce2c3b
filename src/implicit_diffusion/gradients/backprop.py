"""Backpropagation through the whole sampling run: the reference that the adjoint is tested against.

Exact, and as slow and memory-hungry as can be: the activations of all N network calls are kept. One backward pass runs
through all rows, so it has no scale per row for a network in float16, as the adjoint has: take bfloat16 or float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_type
from implicit_diffusion.frozen import refuse_inference_mode
from implicit_diffusion.gradients.adjoint import LOST
from implicit_diffusion.gradients.half import computes_in_float16
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown


class FullBackprop(Shown):
    """∇ℓ from one batch of trajectories by autograd through all N steps."""

    def __call__(
        self, chain: Chain, objective: Objective, noise: Noise, batch: int, index: int = 0
    ) -> dict[str, Tensor]:
        """Add the gradient of trajectory `index` to the parameters' `.grad`; returns the same values as `Adjoint`.

        Raises:
            InvalidInputError: the network computes in float16.
        """
        check_type("chain", chain, Chain, "take Chain(denoiser, table, event_shape)")
        check_type("objective", objective, Objective, "a reward function becomes one by Reward(f)")
        refuse_inference_mode()
        if computes_in_float16(chain.denoiser):
            raise InvalidInputError("FullBackprop: cotangents vanish in a float16 network; take Adjoint, or bfloat16")
        values: dict[str, Tensor] = {}
        with torch.enable_grad(), chain.evaluating(), objective.evaluating():
            x = chain.initial(noise, batch, index)
            total = 0 * x.sum()
            for transition, _, state in chain.walk(x, noise, index, reference=bool(objective.running)):
                x = state[0]
                for weight, running in objective.running:
                    cost = running.cost(transition).mean()
                    total = total + weight * cost
                    values[running.name] = values.get(running.name, 0) + cost.detach()
            end = chain.endpoint(x, noise, index)
            for weight, term in objective.terminal:
                value = term.value(end)
                if weight != 0 and not value.requires_grad:
                    raise InvalidInputError(f"{term.name} {LOST}")
                total = total + weight * value
                values[term.name] = value.detach()
            total.backward()
        return values
