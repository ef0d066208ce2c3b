"""The gradient of any objective of a stationary law, in closed form.

Let π_θ ∝ e^{−V_θ} minimise G(p, θ) = KL(p‖π_θ). Differentiating the condition ∇_p G(π_θ, θ) = const in θ and applying
the adjoint trick, ∇ℓ(θ) = ∇_θ ∫ V_θ dν where ν solves (∇²_p G) ν = −F′ on measures of mass zero. Here the Hessian is
δ_x(x′)/p(x), hence

    ν = −(F′ − E_p F′) · p,         ∇F(π_θ) = ∇_θ ∫ V_θ dν

(Marion et al., arXiv 2402.05468, sections 3 and 4.1; equally the score-function identity
∇_θ E_{π_θ} φ = −Cov(φ, ∇_θ V)). On particles ν is a charge c_j on each point y_j, and the estimate is one backward
pass of Σ_j c_j V_θ(y_j) with the charges held fixed: any module, any parameter tree, no per-sample gradients.

**One fused pass.** The sampler needs ∇_x V at the particles and Γ needs ∇_θ of V at the particles and at the points
that an objective charges besides: one forward serves both. Where all particles bear the same charge c (maximum
likelihood with uniform weights) one pull serves both as well, since ∇_{x_i} Σ_j c V(x_j) = c ∇V(x_i).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives import GibbsObjective
from implicit_diffusion.objectives.base import Charges
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import Energy, evaluate
from implicit_diffusion.showing import of_tuple

CANCELLED = 0.1  # share of Σ|c_j| that Σc_j must keep for the sum to be divided by

Terms = Sequence[tuple[float, GibbsObjective]]


class Fused(NamedTuple):
    """What one pass over the particles yields.

    Args:
        here: V and ∇V at the particles.
        particles: their positions and weights, detached.
        gradients: Γ, one tensor per parameter; None for parameters that V does not use.
        charges: total charge of every particle, with shape (n,).
        values: what every term says of its value, unweighted, by name; terms that cannot tell are missing.
        total: Σ V over particles and points, which is finite where V is.
    """

    here: Energy
    particles: Particles
    gradients: tuple[Tensor | None, ...]
    charges: Float[Tensor, " n"]
    values: dict[str, Tensor]
    total: Float[Tensor, ""]

    def __repr__(self) -> str:
        return of_tuple(self)


def one_pull(terms: Terms) -> bool:
    """Whether one pull serves sampler and Γ on uniform particles: all charges are alike, and do not cancel."""
    total, size = sum(c for c, _ in terms), sum(abs(c) for c, _ in terms)
    return all(term.constant_charges for _, term in terms) and abs(total) > CANCELLED * size


def fused_pass(
    potential: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    terms: Terms,
    x: Float[Tensor, "n *event"],
    points: Sequence[Tensor | None],
    weigh: Callable[[Energy], Particles] | None = None,
) -> Fused:
    """V, ∇V and Γ at the particles, from one forward.

    Args:
        potential: V_θ.
        parameters: θ, those that require a gradient.
        terms: pairs (coefficient, term) of the objective.
        x: particles.
        points: for every term what its `draw` returned.
        weigh: from V and ∇V at the particles to the particles with their weights and log Z; without it the weights are
            uniform.
    """
    others = [y for y in points if y is not None]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energies = evaluate(potential, torch.cat([x, *others]) if others else x)
        energy, *rest = energies.split([len(x), *map(len, others)])
        one = weigh is None and one_pull(terms)
        if not one:
            (force,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
            here = Energy(energy.detach(), force)
        particles = Particles(x.detach()) if weigh is None else weigh(here)
        on_particles, values, remaining = torch.zeros_like(energy), {}, iter(rest)
        outside: list[Tensor] = []
        for (weight, term), y in zip(terms, points, strict=True):
            # A black box may write into what it is given: every term gets a copy of its own.
            own = Particles(x.detach().clone(), particles.log_weights, particles.log_z, particles.log_z_growth)
            found: Charges = term.charges(own, energy.detach(), y)
            on_particles = on_particles.add(found.particles, alpha=weight)
            at_points = None if y is None else next(remaining)
            if found.on_points is not None:
                if at_points is None or at_points.shape != found.on_points.shape:
                    raise InvalidInputError(f"{term.name} charges points: its `draw` must return them, one per charge")
                outside.append(weight * (found.on_points @ at_points))
            value = term.estimate(found, None if at_points is None else at_points.detach(), particles.log_z)
            if value is not None:
                values[term.name] = value
        total = sum(outside, start=on_particles @ energy)
        if one:
            force, *gradients = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
            here = Energy(energy.detach(), force / on_particles.view(-1, *[1] * (x.ndim - 1)))
        else:
            gradients = list(torch.autograd.grad(total, list(parameters), allow_unused=True))
    return Fused(here, particles, dense(gradients), on_particles, values, energies.detach().sum())


def dense(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of embeddings with `sparse=True` as ordinary tensors, which have norms and can be averaged."""
    return tuple(g.to_dense() if g is not None and g.layout is torch.sparse_coo else g for g in gradients)
