"""The exact discrete adjoint of a denoising chain.

For the recursion x_{k+1} = a_k x_k + b_k u_θ(m_k x_k, t_k) + s_k ξ_k with terminal objective F and running costs c_k,
write f(x_1..x_B) = F(Σ_i δ_{x_i}/B). The chain rule, read from the end, is

    λ_N,i = ∂f/∂x_i
    surrogate_k = ⟨b_k λ_{k+1}, u_θ(m_k x_k, t_k)⟩ + (1/B) Σ_i c_k(x_k,i, θ)
    Γ += ∇_θ surrogate_k,        λ_k = a_k λ_{k+1} + ∇_{x_k} surrogate_k

so that Γ is the gradient of f + Σ_k mean c_k along the trajectory's noise, exact but for rounding (discretise, then
differentiate). Only the states x_k are kept: memory does not grow with the network's activations times N. Each row
costs one call of the network with gradient, through `.backward()`, so that distributed wrappers see it. Where the
network computes in float16, each call's surrogate is scaled into its range (`implicit_diffusion.gradients.half`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_type
from implicit_diffusion.frozen import refuse_inference_mode
from implicit_diffusion.gradients import half
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective, TerminalObjective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

LOST = (
    "does not depend on the samples any more: its result comes without a gradient, as after .detach(), .numpy() or "
    "torch.no_grad(); θ was left as it was"
)


def terminal_adjoint(
    objective: Objective, x: Float[Tensor, "batch *event"], condition: Mapping[str, Tensor] | None = None
) -> tuple[Float[Tensor, "batch *event"], dict[str, Tensor]]:
    """λ_N = ∂f/∂x_i at the end of a batch of trajectories, and the terminal terms' values by name, unweighted.

    Raises:
        InvalidInputError: a term whose value depends on the samples no more (a reward that detaches them later on).
    """
    x = x.detach().requires_grad_()
    adjoint, values = torch.zeros_like(x), {}
    with torch.enable_grad(), objective.evaluating():
        for weight, term in objective.terminal:
            value = term.value(Particles(x, condition=condition))
            values[term.name] = value.detach()
            if weight != 0:
                adjoint = adjoint + slope(term, weight * value, x)
    return adjoint, values


def slope(term: TerminalObjective, value: Float[Tensor, ""], x: Float[Tensor, "batch *event"]) -> Tensor:
    """∂ value/∂x, of a term that depended on the samples x when its loop began."""
    found = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise InvalidInputError(f"{term.name} {LOST}")
    return found


def pull_back(
    chain: Chain,
    objective: Objective,
    x: Float[Tensor, "slots batch *event"],
    rows: Sequence[int],
    adjoint: Float[Tensor, "slots batch *event"],
    condition: Mapping[str, Tensor] | None = None,
) -> tuple[Float[Tensor, "slots batch *event"], dict[str, Float[Tensor, " slots"]]]:
    """One row of the adjoint on several slots at once: adds ∇_θ surrogate to `.grad`.

    Args:
        chain: the sampler.
        objective: gives the running costs.
        x: states x_k, one row k per slot.
        rows: the rows k, one per slot.
        adjoint: λ_{k+1}.
        condition: of the slots, from `Chain.conditions`.

    Returns:
        λ_k, and the batch mean of every running cost on every slot, unweighted, by name.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        transition = chain.transition(x, rows, reference=bool(objective.running), condition=condition)
        surrogate = (transition.b * adjoint * transition.u).sum()
        costs = {}
        for weight, term in objective.running:
            cost = term.cost(transition).mean(1)
            surrogate = surrogate + weight * cost.sum()
            costs[term.name] = cost.detach()
    if half.computes_in_float16(chain.denoiser):
        half.backward(surrogate, (transition.u, transition.u0), (x, *chain.denoiser.parameters()))
    else:
        surrogate.backward()
    assert x.grad is not None
    return transition.a * adjoint + x.grad, costs


class Adjoint(Shown):
    """∇ℓ from one batch of trajectories: sample them, then run the adjoint back from the end."""

    def __call__(
        self, chain: Chain, objective: Objective, noise: Noise, batch: int, index: int = 0
    ) -> dict[str, Tensor]:
        """Add the gradient of trajectory `index` to the parameters' `.grad`.

        Returns:
            every term's value by name, unweighted, running costs summed over the rows (a path KL is in nats).
        """
        check_type("chain", chain, Chain, "take Chain(denoiser, table, event_shape)")
        check_type("objective", objective, Objective, "a reward function becomes one by Reward(f)")
        refuse_inference_mode()
        states = chain.trajectory(noise, batch, index)
        condition = chain.conditions(noise, batch, [index])
        with chain.evaluating():
            end = chain.endpoint(states.pop(), noise, index)
            adjoint, values = terminal_adjoint(objective, end.x, end.condition)
            lam = adjoint[None]
            for row in reversed(range(chain.num_steps)):
                lam, costs = pull_back(chain, objective, states.pop()[None], [row], lam, condition)
                for name, cost in costs.items():
                    values[name] = values.get(name, 0) + cost.sum()
        return values
