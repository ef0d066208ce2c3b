"""Backpropagation through the whole sampling run: the reference that the adjoint is tested against.

Exact, slow and memory-hungry: the activations of all N network calls are kept. One backward pass runs through all rows,
so it has no scale per row for a network in float16, as the adjoint has: use bfloat16 or float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients.adjoint import LOST, check_slopes
from implicit_diffusion.gradients.estimator import Estimator, TrajectoryResult, averaged
from implicit_diffusion.gradients.footprint import Footprint, bytes_of, end_activations, row_activations
from implicit_diffusion.gradients.loss_scaling import computes_in_float16
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain


class FullBackprop(Estimator):
    """∇ℓ from one batch of trajectories by autograd through all N steps. Needs the gradient of the reward.

    It keeps the graph of a whole trajectory, under one θ, so it serves the loop `Nested` alone.
    """

    def check(self, chain: Chain, objective: Objective, end: Particles) -> None:
        """Raise `InvalidInputError` where a terminal term has no gradient in the samples, or the network computes in
        float16.
        """
        self._check_precision(chain)
        check_slopes(objective, end)

    def gradient(self, chain: Chain, objective: Objective, noise: Noise, batch: int, index: int) -> TrajectoryResult:
        """Add the gradient of trajectory `index` to the parameters' `.grad`; returns the same values as `Adjoint`.

        Raises:
            InvalidInputError: the network computes in float16; a term that does not depend on the samples.
        """
        self._check_precision(chain)
        values: dict[str, Tensor] = {}
        costs: dict[str, Tensor] = {}
        evaluations = 0
        with torch.enable_grad(), chain.evaluating(), objective.evaluating():
            x = chain.initial(noise, batch, index)
            total = 0 * x.sum()
            for transition, _, state in chain.walk(x, noise, index, reference=bool(objective.running)):
                x, evaluations = state[0], evaluations + transition.evaluations
                for weight, running in objective.running:
                    cost = running.cost(transition).mean()
                    total = total + weight * cost / processes.count()
                    costs[running.name] = costs.get(running.name, 0) + cost.detach()
            end = chain.endpoint(x, noise, index)
            for weight, term in objective.terminal:
                value = term.shared_value(end)
                if weight != 0 and not value.requires_grad:
                    raise InvalidInputError(f"{term.name} {LOST}")
                total = total + weight * value
                values[term.name] = value.detach()
            total.backward()
        return TrajectoryResult(averaged(costs)[0] | values, evaluations)

    def memory(self, chain: Chain, objective: Objective, noise: Noise) -> Footprint:
        """The activations of all rows at once."""
        row, recomputed = row_activations(chain, objective, noise)
        end = end_activations(chain, objective, noise)
        return Footprint(
            carry=bytes_of(chain.event_shape, chain.dtype), turn=end, pull=recomputed, held=chain.num_steps * row
        )

    def _check_precision(self, chain: Chain) -> None:
        if computes_in_float16(chain.denoiser):
            raise InvalidInputError("FullBackprop: cotangents vanish in a float16 network; use Adjoint, or bfloat16")
