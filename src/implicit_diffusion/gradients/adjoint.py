"""The exact discrete adjoint of a denoising chain.

For the recursion x_{k+1} = a_k x_k + b_k u_θ(m_k x_k, t_k) + s_k ξ_k with terminal objective F and running costs c_k,
write f(x_1..x_B) = F(Σ_i δ_{x_i}/B). The chain rule, read from the end, is

    λ_N,i = ∂f/∂x_i
    surrogate_k = ⟨b_k λ_{k+1}, u_θ(m_k x_k, t_k)⟩ + (1/B) Σ_i c_k(x_k,i, θ)
    Γ += ∇_θ surrogate_k,        λ_k = a_k λ_{k+1} + ∇_{x_k} surrogate_k

so that Γ is the gradient of f + Σ_k mean c_k along the trajectory's noise, exact to rounding (discretise, then
differentiate). Only the states x_k are kept: memory does not grow with the network's activations times N. Each row
costs one call of the network with gradient, through `.backward()`, so that distributed wrappers see it. Where the
network computes in float16, each call's surrogate is scaled into its range: see
`implicit_diffusion.gradients.loss_scaling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, trying
from implicit_diffusion.gradients import loss_scaling
from implicit_diffusion.gradients.estimator import Carry, Pulled, RowEstimator, RowStates
from implicit_diffusion.gradients.footprint import Footprint, bytes_of, end_activations, row_activations
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective, TerminalObjective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.transition import Transition

LOST = (
    "does not depend on the samples any more: its result comes without a gradient, as after .detach(), .numpy() or "
    "torch.no_grad(); θ was left as it was"
)


def check_slopes(objective: Objective, end: Particles) -> None:
    """Raise `InvalidInputError` where a terminal term has no gradient in the positions of the samples `end`, unless its
    weight is zero.
    """
    for weight, term in objective.terminal:
        if weight != 0:
            with trying(term.name, f"samples of shape {tuple(end.x.shape)}"):
                term.check_slope(end)


def terminal_adjoint(
    objective: Objective, x: Float[Tensor, "batch *event"], condition: Mapping[str, Tensor] | None = None
) -> tuple[Float[Tensor, "batch *event"], dict[str, Float[Tensor, ""]]]:
    """λ_N = ∂f/∂x_i at the end of a batch of trajectories, and the terminal terms' values by name, unweighted.

    Raises:
        InvalidInputError: a term whose value no longer depends on the samples (a reward that detaches them later on).
    """
    x = x.detach().requires_grad_()
    adjoint, values = torch.zeros_like(x), {}
    with torch.enable_grad(), objective.evaluating():
        for weight, term in objective.terminal:
            value = term.shared_value(Particles(x, condition=condition))
            values[term.name] = value.detach()
            if weight != 0:
                adjoint = adjoint + slope(term, weight * value, x)
    return adjoint, values


def slope(term: TerminalObjective, value: Float[Tensor, ""], x: Float[Tensor, "batch *event"]) -> Tensor:
    """∂ value/∂x, of a term that depended on the samples x when its loop began."""
    gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise InvalidInputError(f"{term.name} {LOST}")
    return gradient


def pull_back(
    chain: Chain,
    objective: Objective,
    x: Float[Tensor, "slots batch *event"],
    rows: Sequence[int],
    adjoint: Float[Tensor, "slots batch *event"],
    condition: Mapping[str, Tensor] | None = None,
    at_fixed_states: Callable[[Transition], Float[Tensor, ""]] | None = None,
) -> tuple[Float[Tensor, "slots batch *event"], dict[str, Float[Tensor, " slots"]], int]:
    """One row of the adjoint on several slots at once: adds ∇_θ surrogate to `.grad`.

    Args:
        chain: the sampler.
        objective: gives the running costs.
        x: states x_k, one row k per slot.
        rows: the rows k, one per slot.
        adjoint: λ_{k+1}.
        condition: of the slots, from `Chain.conditions`.
        at_fixed_states: a further scalar of the transition, differentiated in θ alone: it has no part in λ_k.

    Returns:
        λ_k; the mean of every running cost over every slot, unweighted, by name; network calls × samples.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        transition = chain.transition(x, rows, reference=bool(objective.running), condition=condition)
        cost, costs = running_costs(objective, transition)
        surrogate = (transition.b * adjoint * transition.u).sum() + cost
        further = None if at_fixed_states is None else at_fixed_states(transition)
    through: Tensor | float = 0.0
    if further is not None:  # the graph serves both scalars, at the price of one more pass, which stops at x
        through = loss_scaling.slope_through(chain.denoiser, further, transition, x)
        surrogate = surrogate + further
    loss_scaling.backward_through(chain.denoiser, surrogate, transition, x)
    assert x.grad is not None
    return transition.a * adjoint + (x.grad - through), costs, transition.evaluations


def running_costs(
    objective: Objective, transition: Transition
) -> tuple[Float[Tensor, ""] | float, dict[str, Float[Tensor, " slots"]]]:
    """This process's part of the mean over the batch of all running costs, weighted and added up; and the mean of every
    running cost over its own samples on every slot, unweighted, by name.
    """
    total: Tensor | float = 0.0
    costs = {}
    for weight, term in objective.running:
        cost = term.cost(transition).mean(1)
        total = total + weight * cost.sum() / processes.count()
        costs[term.name] = cost.detach()
    return total, costs


class Adjoint(RowEstimator):
    """∇ℓ by the exact adjoint of the chain, over all of its rows. Needs the gradient of the reward.

    By itself it adds the gradient of one batch of trajectories to `.grad`:

        values = Adjoint()(chain, Reward(r) + 0.1 * PathKL(), Noise(0), batch=16)
    """

    parts: ClassVar[Mapping[str, str]] = {"adjoint": "adjoints λ"}

    def check(self, chain: Chain, objective: Objective, end: Particles) -> None:
        """Raise `InvalidInputError` where a terminal term has no gradient in the samples."""
        check_slopes(objective, end)

    def turn(self, objective: Objective, end: Particles) -> tuple[Carry, dict[str, Float[Tensor, ""]]]:
        """λ_N; see `terminal_adjoint`."""
        adjoint, values = terminal_adjoint(objective, end.x, end.condition)
        return {"adjoint": adjoint}, values

    def pull(self, chain: Chain, objective: Objective, at: RowStates, carry: Carry) -> Pulled:
        """λ_k from λ_{k+1}; see `pull_back`."""
        adjoint, costs, evaluations = pull_back(chain, objective, at.x, at.rows, carry["adjoint"], at.condition)
        return Pulled({"adjoint": adjoint}, costs, evaluations)

    def memory(self, chain: Chain, objective: Objective, noise: Noise) -> Footprint:
        """An adjoint per sample, and the activations of a single row."""
        row, recomputed = row_activations(chain, objective, noise)
        end = end_activations(chain, objective, noise)
        return Footprint(carry=bytes_of(chain.event_shape, chain.dtype), turn=end, pull=row + recomputed)
