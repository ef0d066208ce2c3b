"""What a loop over particles is given: particles, at its start and while it runs, and parts that must fit them."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.design.gain import check_experiment
from implicit_diffusion.design.posterior import PosteriorKernel
from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, memory_for, trying
from implicit_diffusion.gradients.adjoint_measure import AdjointSolver
from implicit_diffusion.gradients.conjugate_gradients import ConjugateGradients
from implicit_diffusion.gradients.fused import GIBBS
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles, checked_particles
from implicit_diffusion.potentials.inner_problem import InnerProblem, check_interaction
from implicit_diffusion.rounding import at_least_single
from implicit_diffusion.samplers.draws import innermost
from implicit_diffusion.samplers.kernel import Kernel


def initial_particles(potential: nn.Module, particles: Tensor | int, noise: Noise) -> Float[Tensor, "n *event"]:
    """X_0 as a loop keeps it: a copy in single precision at least, short vectors with the particles innermost.

    Args:
        potential: V, whose dtype and device the particles must have.
        particles: X_0; or its number, to draw it with `potential.sample(n, noise)`.
        noise: to draw from.

    Raises:
        InvalidInputError: fewer than two particles; a number of them for a potential without `sample`; another dtype
            or device than the potential's; no finite floating-point numbers.
        MemoryLimitError: more particles than the device can hold.
    """
    if isinstance(particles, Integral) and not isinstance(particles, bool):
        x = _drawn(potential, particles, noise)
    else:
        x = particles
    first = next(potential.parameters())
    if (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and (at_least_single(first.dtype), first.device) != (at_least_single(x.dtype), x.device)
    ):
        raise InvalidInputError(
            f"particles are {x.dtype} on {x.device}, the potential's parameters {first.dtype} on {first.device}; use "
            "particles.to(device, dtype)"
        )
    return innermost(checked_particles(x).clone())


def _drawn(potential: Any, number: Any, noise: Noise) -> Tensor:
    if number < 2:
        raise InvalidInputError(f"particles must be at least 2, got {number}")
    count = check_integer("particles", number, 2)
    if not hasattr(potential, "sample"):
        raise InvalidInputError(
            f"particles={number} needs a potential with a method sample(n, noise); pass the particles themselves, "
            "with shape (n, *event)"
        )
    with trying("potential.sample", f"({count}, noise)"), memory_for(f"{count} particles"):
        x: Tensor = potential.sample(count, noise)
    check_type("what potential.sample returns", x, Tensor, "it draws n of them, with shape (n, *event)")
    return x


def replacing_particles(
    particles: Particles, present: Float[Tensor, "n *event"], weighted: bool
) -> tuple[Float[Tensor, "n *event"], Float[Tensor, " n"]]:
    """Positions and log-weights of particles that take the place of those that a loop has; zeros where they have none.

    Args:
        particles: the new ones.
        present: the positions of the old ones.
        weighted: whether the loop has weights.

    Raises:
        InvalidInputError: particles of another number, shape, dtype or device, or not finite; weights in a loop
            without weights, or weights that are not finite, except for −∞.
    """
    check_type("particles", particles, Particles, "use Particles(x)")
    x = particles.x.detach()
    x = x.to(at_least_single(x.dtype)) if x.is_floating_point() else x
    if (x.shape, x.dtype, x.device) != (present.shape, present.dtype, present.device) or (
        particles.log_weights is not None and not weighted
    ):
        raise InvalidInputError(
            f"refresh needs {tuple(present.shape)} particles, {present.dtype} on {present.device}, with weights only "
            f"in a loop with weighted=True, got {tuple(x.shape)}, {x.dtype} on {x.device}"
        )
    if not x.isfinite().all():
        raise InvalidInputError("refresh needs finite particles, but they hold NaN or infinity")
    n = len(x)
    log_weights = x.new_zeros(n) if particles.log_weights is None else particles.log_weights.to(x)
    if log_weights.shape != (n,) or not (log_weights < math.inf).all() or not log_weights.isfinite().any():
        raise InvalidInputError(
            f"refresh needs log-weights of shape ({n},) that are finite, or −∞ for some, got {tuple(log_weights.shape)}"
        )
    return innermost(x.clone()), log_weights


def check_parts(kernel: Kernel, objective: Objective, *, keeps_weights: bool) -> None:
    """Raise `InvalidInputError` for a kernel without the weights that are asked for, or a term of denoising chains."""
    if keeps_weights and isinstance(kernel, PosteriorKernel):
        raise InvalidInputError(
            "PosteriorKernel: the pairs of an experiment have no weights, since every outcome has a normaliser of its "
            "own; use weighted=False, lag=False, and design.lag to see whether they keep up"
        )
    if keeps_weights and not kernel.weighted:
        raise InvalidInputError(
            f"{type(kernel).__name__} has no increment of weights; use ULA, MALA or HMC, or weighted=False"
        )
    if objective.running:
        names = ", ".join(type(term).__name__ for _, term in objective.running)
        raise InvalidInputError(
            f"{names} is paid along a denoising chain, and a stationary sampler has none; to stay near the initial "
            "potential use ReverseKL.to_initial(potential)"
        )


def solver_of(
    potential: nn.Module,
    kernel: Kernel,
    x: Float[Tensor, "n *event"],
    solver: AdjointSolver | None,
    objective: Objective,
    *,
    keeps_weights: bool,
) -> AdjointSolver:
    """The solver of a loop, checked.

    Args:
        potential: V, or an inner problem.
        kernel: the sampler's step.
        x: the initial particles.
        solver: that was asked for.
        objective: F.
        keeps_weights: whether the particles are to be weighted.

    Raises:
        InvalidInputError: something that particles which interact cannot have: weights, or a Metropolis test; an
            interaction that is not symmetric; an objective that the solver has no solution for.
    """
    check_experiment(potential, kernel, objective)
    if solver is not None:
        check_type("solver", solver, AdjointSolver, "use ConjugateGradients(coupling), or leave it out")
    if isinstance(potential, InnerProblem):
        name = type(potential).__name__
        if keeps_weights:
            raise InvalidInputError(f"{name}: particles that interact have no weights; use weighted=False, lag=False")
        if kernel.target_acceptance is not None:
            raise InvalidInputError(
                f"{type(kernel).__name__} accepts particles one by one, but those of {name} interact; use ULA or "
                "Underdamped"
            )
        check_interaction(potential, x)
        solver = ConjugateGradients(potential.coupling) if solver is None else solver
    solver = GIBBS if solver is None else solver
    solver.check(objective.stationary)
    return solver
