"""One pass over the particles that serves both the sampler and Γ.

The sampler needs ∇_x V at the particles. Γ = ∇_θ Σ_j c_j V_θ(y_j), with the charges c of the adjoint measure
(`implicit_diffusion.gradients.adjoint_measure`) held fixed, needs ∇_θ of V at the particles and at the outside points
that an objective charges. One forward serves both: any module, any parameter tree, no gradients per sample.

Where all particles carry the same charge c (maximum likelihood with uniform weights), one pull serves both as well:
∇_{x_i} Σ_j c V(x_j) = c ∇V(x_i).

A term may depend on the value of the inner problem itself, min_p G(p, θ) = −log Z_θ, as the evidence does. By the
envelope theorem its gradient is ∂_θG at the minimiser, ∇_θ E_p V_θ with p held fixed: the charges are p, times the
derivative of F in that value (`GibbsObjective.in_minimum`), of a total that is not zero.

Where processes share the particles, each makes a pass over its own, and over its share of the points; Γ is the sum of
what they find.

A pass may serve several runs at once, each with particles and a θ of its own (`loops.Vectorized`). All tensors then
have the runs as their first dimension, V is called once, and both pulls go through all of V, whose entries depend on
one run each. What combines the particles of a run, its charges above all, is mapped over the runs: see `OneRun`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from implicit_diffusion.samplers.kernel import Step
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


class Charges(NamedTuple):
    """Charges of one run under all terms of the objective.

    Args:
        on_particles: total charge of every particle, with shape (n,).
        on_points: for every term, weighted, those of the points that its `draw` returned; None where it has none.
        values: the value of every term that knows it, unweighted, by name.
    """

    on_particles: Tensor
    on_points: list[Tensor | None]
    values: dict[str, Tensor]

    def __repr__(self) -> str:
        return of_tuple(self)


class OneRun:
    """How functions of one run are applied, where there is one: as they are.

    Attributes:
        dim: the dimension of the particles.
    """

    dim = 0

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, of what one run has, for all runs."""
        return function

    def of_terms(self, function: Callable[..., Any], terms: Terms) -> Callable[..., Any]:
        """The function, whose first argument are the terms of a run's objective, for all runs."""
        return partial(function, terms)

    def particles(self, x: Tensor, log_weights: Tensor, log_z: Tensor | None, log_z_growth: Tensor) -> Any:
        """What holds the weights and log Z of all runs under these names, as `Particles` do for one."""
        return Particles(x, log_weights, log_z, log_z_growth)

    def step(self, step: Step) -> Step:
        """A step of the particles of all runs, one after the other."""
        return step

    def flat(self, x: Tensor) -> Tensor:
        """Numbers of the particles of all runs, one after the other."""
        return x

    def stacked(self, x: Tensor) -> Tensor:
        """The inverse of `flat`."""
        return x

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of every run's Γ. See `loops.single` for why it must not be computed by foreach when compiled."""
        return torch.nn.utils.get_total_norm(gradients, foreach=False if torch.compiler.is_compiling() else None)


ONE = OneRun()


def one_pull(terms: Terms, solver: AdjointSolver = GIBBS) -> bool:
    """Whether one pull serves sampler and Γ on uniform particles: all charges are the same, and do not cancel."""
    total = sum(c * (t.in_minimum - (t.support == "points")) for c, t in terms)
    size = sum(abs(c) for c, _ in terms)
    return solver.same_charges(terms) and abs(total) > CANCELLED * size


def fused_pass(
    potential: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    terms: Terms,
    x: Float[Tensor, "n *event"],
    points: Sequence[Tensor | None],
    weigh: Callable[[Energy], Any] | None = None,
    solver: AdjointSolver = GIBBS,
    runs: OneRun = ONE,
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
        runs: how many runs this pass serves; where there are several, every tensor has them as its first dimension.

    Raises:
        InvalidInputError: a term whose measure the solver does not support, lies elsewhere than the term declares, or
            has numbers for other points than it drew.
    """
    solver.check(terms)
    points = [own_points(term, y, solver) for (_, term), y in zip(terms, points, strict=True)]
    others = [y for y in points if y is not None]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energies = value_of(potential, torch.cat([x, *others], runs.dim) if others else x)
        energy, *rest = energies.split([part.shape[runs.dim] for part in (x, *others)], runs.dim)
        one = weigh is None and one_pull(terms, solver)
        if not one:
            (force,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
            here = Energy(energy.detach(), force)
        particles = Particles(x.detach()) if weigh is None else weigh(here)
        remaining = iter(rest)
        at_points = [None if y is None else next(remaining) for y in points]
        known = [None if v is None else v.detach() for v in at_points]
        weights = (particles.log_weights, particles.log_z, particles.log_z_growth)
        with torch.no_grad():
            charges = runs.of_terms(charges_of, terms)(solver, x.detach(), energy.detach(), weights, points, known)
        pairs = zip(charges.on_points, at_points, strict=True)
        outside = [(c * v).sum() for c, v in pairs if c is not None and v is not None]
        total = sum(outside, start=(charges.on_particles * energy).sum())
        if one:
            force, *gradients = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
            extra = [1] * (x.ndim - energy.ndim)
            here = Energy(energy.detach(), force / charges.on_particles.view(*energy.shape, *extra))
        else:
            gradients = list(torch.autograd.grad(total, list(parameters), allow_unused=True))
    on_particles, _, values = charges
    return Fused(here, particles, dense(gradients), on_particles, values, energies.detach().sum())


def charges_of(
    terms: Terms,
    solver: AdjointSolver,
    x: Float[Tensor, "n *event"],
    energy: Float[Tensor, " n"],
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    points: Sequence[Tensor | None],
    at_points: Sequence[Tensor | None],
) -> Charges:
    """The charges of one run.

    Args:
        terms: pairs (coefficient, term) of the objective.
        solver: from the terms' first variations to their adjoint measures.
        x: particles, with shape (n, *event).
        energy: V there.
        weights: log-weights, log Z and the growth of log Z, as `Particles` hold them.
        points: for every term, this process's part of what its `draw` returned.
        at_points: V there.
    """
    particles, on_particles = Particles(x, *weights), torch.zeros_like(energy)
    on_points: list[Tensor | None] = []
    values: dict[str, Tensor] = {}
    for (weight, term), y, v in zip(terms, points, at_points, strict=True):
        own = Particles(x.clone(), *weights)  # a black box may write into what it is given
        variation = term.shared_variation(own, Density(energy, y, v))
        variation.check_support(term.name, term.support)
        measure = solver.shared(variation, particles, term.name)
        on_particles = on_particles.add(measure.on_particles, alpha=weight)
        if term.in_minimum:
            direct = particles.weights.to(on_particles.dtype)
            on_particles = on_particles.add(direct, alpha=weight * term.in_minimum)
        on_points.append(None if measure.on_points is None else weight * measure.on_points)
        if measure.on_points is not None and (v is None or v.shape != measure.on_points.shape):
            raise InvalidInputError(
                f"{term.name} has a measure on points: its `draw` must return them, one for each number"
            )
        if variation.value is not None:
            values[term.name] = variation.value
    return Charges(on_particles, on_points, values)


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
