"""One pass over the particles that serves both the sampler and Γ.

The sampler needs ∇_x V at the particles. Γ = ∇_θ Σ_j c_j V_θ(y_j), with the charges c of the adjoint measure
(`implicit_diffusion.gradients.adjoint_measure`) held fixed, needs ∇_θ of V at the particles and at the outside points
that an objective charges. One forward serves both: any module, any parameter tree, no gradients per sample.

Where all particles carry the same charge c (maximum likelihood with uniform weights), one pull serves both as well:
∇_{x_i} Σ_j c V(x_j) = c ∇V(x_i).

A term with support "none" is the value of the inner problem itself, min_p G(p, θ) = −log Z_θ. By the envelope theorem
its gradient is ∂_θG at the minimiser, ∇_θ E_p V_θ with p held fixed: the charges are p, of total one and not zero.

Where processes share the particles, each makes a pass over its own, and over its share of the points; Γ is the sum of
what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients.adjoint_measure import AdjointSolver, Terms
from implicit_diffusion.gradients.gibbs import Gibbs
from implicit_diffusion.objectives import Density, GibbsObjective
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import Energy, value_of
from implicit_diffusion.showing import of_tuple

CANCELLED = 0.1  # share of Σ|c_j| that Σc_j must keep for the sum to be divided by
GIBBS = Gibbs()


class Fused(NamedTuple):
    """What one pass over the particles yields.

    Args:
        here: V and ∇V at the particles.
        particles: their positions and weights, detached.
        gradients: this process's part of Γ, one tensor per parameter; None for parameters that V does not use.
        charges: total charge of every particle, with shape (n,).
        values: the value of every term that knows it, unweighted, by name.
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


def one_pull(terms: Terms, solver: AdjointSolver = GIBBS) -> bool:
    """Whether one pull serves sampler and Γ on uniform particles: all charges are the same, and do not cancel."""
    total, size = sum(c if t.support == "none" else -c for c, t in terms), sum(abs(c) for c, _ in terms)
    return solver.same_charges(terms) and abs(total) > CANCELLED * size


def fused_pass(
    potential: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    terms: Terms,
    x: Float[Tensor, "n *event"],
    points: Sequence[Tensor | None],
    weigh: Callable[[Energy], Particles] | None = None,
    solver: AdjointSolver = GIBBS,
) -> Fused:
    """V, ∇V and Γ at the particles, from one forward.

    Args:
        potential: V_θ, (n, *event) → (n,).
        parameters: θ, those that require a gradient.
        terms: pairs (coefficient, term) of the objective.
        x: particles, with shape (n, *event).
        points: for every term what its `draw` returned, in all processes alike.
        weigh: from V and ∇V at the particles to the particles with their weights and log Z; without it the weights are
            uniform.
        solver: from the terms' first variations to their adjoint measures.

    Raises:
        InvalidInputError: a term whose measure the solver does not support, lies elsewhere than the term declares, or
            has numbers for other points than it drew.
    """
    solver.check(terms)
    points = [own_points(term, y, solver) for (_, term), y in zip(terms, points, strict=True)]
    others = [y for y in points if y is not None]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energies = value_of(potential, torch.cat([x, *others]) if others else x)
        energy, *rest = energies.split([len(x), *map(len, others)])
        one = weigh is None and one_pull(terms, solver)
        if not one:
            (force,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
            here = Energy(energy.detach(), force)
        particles = Particles(x.detach()) if weigh is None else weigh(here)
        charges, values, remaining = torch.zeros_like(energy), {}, iter(rest)
        outside: list[Tensor] = []
        for (weight, term), y in zip(terms, points, strict=True):
            # A black box may write into what it is given: every term gets a copy of its own.
            own = Particles(x.detach().clone(), particles.log_weights, particles.log_z, particles.log_z_growth)
            at_points = None if y is None else next(remaining)
            density = Density(energy.detach(), y, None if at_points is None else at_points.detach())
            with torch.no_grad():
                variation = term.shared_variation(own, density)
                variation.check_support(term.name, term.support)
                measure = solver.shared(variation, particles, term.name)
            charges = charges.add(measure.on_particles, alpha=weight)
            if term.support == "none":
                charges = charges.add(particles.weights.to(charges.dtype), alpha=weight)
            if measure.on_points is not None:
                if at_points is None or at_points.shape != measure.on_points.shape:
                    raise InvalidInputError(
                        f"{term.name} has a measure on points: its `draw` must return them, one for each number"
                    )
                outside.append(weight * (measure.on_points @ at_points))
            if variation.value is not None:
                values[term.name] = variation.value
        total = sum(outside, start=charges @ energy)
        if one:
            force, *gradients = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
            here = Energy(energy.detach(), force / charges.view(-1, *[1] * (x.ndim - 1)))
        else:
            gradients = list(torch.autograd.grad(total, list(parameters), allow_unused=True))
    return Fused(here, particles, dense(gradients), charges, values, energies.detach().sum())


def own_points(term: GibbsObjective, points: Tensor | None, solver: AdjointSolver = GIBBS) -> Tensor | None:
    """The points at which this process evaluates V: its share of them, or all of them.

    They are shared out where the processes can have equally many, and nobody needs them together. Elsewhere all
    processes have them all, and charge each by 1/W of its charge.
    """
    if points is None or not (term.separable and solver.separable) or len(points) % processes.count():
        return points
    return processes.share(points)


def dense(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of embeddings with `sparse=True` as ordinary tensors, which have norms and can be averaged."""
    return tuple(g.to_dense() if g is not None and g.layout is torch.sparse_coo else g for g in gradients)
