"""What the single loop is compared with: the nested loop and the unrolled sampler, over the same particles and kernels.

They exist to be compared with at equal work (`gradient_evaluations`, pulls through V at all the particles) and at equal
seconds, and are no defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_choice, check_integer
from implicit_diffusion.gradients.adjoint import LOST
from implicit_diffusion.gradients.fused import dense, fused_pass
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.objectives import TerminalObjective
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import Energy, energy_of, evaluate
from implicit_diffusion.samplers.kernel import innermost

Begin = Literal["initial", "last", "data"]


class NestedParticles(ParticleLoop):
    """Run the sampler first, then make one update: T steps of the kernel under one θ, and Γ at the last particles.

    Args:
        inner_steps: T ≥ 1.
        begin: every inner run at "initial", X_0; at "last", where the one before ended (persistent contrastive
            divergence); or at "data", the draw of the objective that has data (contrastive divergence, Hinton, 2002).

    The other arguments are those of `ParticleLoop`; the particles carry no weights.
    """

    def __init__(self, *args: Any, inner_steps: int, begin: Begin = "initial", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inner_steps = check_integer("inner_steps", inner_steps)
        check_choice("begin", begin, get_args(Begin))
        _refuse_weights(self)
        self.inner_steps, self.begin, self.initial = inner_steps, begin, self.walkers
        if begin == "data" and len(self._data(self._points(0))) != self.n:
            raise InvalidInputError(
                f'begin="data" needs as many particles as data per estimate, got {self.n} and '
                f"{len(self._data(self._points(0)))}; set the batch of the objective"
            )

    def _words(self) -> Iterable[str]:
        return *super()._words(), f"inner_steps={self.inner_steps}", f"begin={self.begin!r}"

    def step(self) -> dict[str, Any]:
        self.update.begin()
        start = self.iteration * self.inner_steps
        points = self._points(self.iteration)
        walkers = self.initial if self.begin == "initial" else self.walkers
        if self.begin == "data":
            walkers = walkers._replace(x=innermost(self._data(points)))
        with self.evaluating():
            for k in range(start, start + self.inner_steps):
                walkers, move = self._take(walkers, energy_of(self.model, walkers.x), self._draws(k), self._h(k))
            fused = fused_pass(self.model, self.parameters, self.objective.stationary, walkers.x, points)
        self._hand_over(fused.gradients)
        self.iteration += 1
        self.evaluations += self.inner_steps * self.kernel.evaluations + 1
        moved = self.update.step([walkers.x.sum(), fused.total], lambda: self._diagnose(walkers, fused.values))
        self.walkers = walkers
        acceptance = {} if move.acceptance is None else {"acceptance": move.acceptance.mean()}
        return self._metrics(fused.values) | acceptance | moved

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"inner_steps": self.inner_steps, "begin": self.begin}

    def _data(self, points: list[Tensor | None]) -> Tensor:
        drawn = [y for y in points if y is not None]
        if not drawn:
            raise InvalidInputError('begin="data" needs an objective with data, such as ForwardKL')
        return drawn[0]


class Unrolled(ParticleLoop):
    """Differentiate F through the last K steps of the sampler by automatic differentiation, then update.

    Each step moves the particles K times with θ in the graph; what θ did to them before is cut off, which biases the
    gradient, and the graph is K steps deep. It needs an objective that is differentiable in the particles: jumps of a
    reward do not show. Kernels that reject are refused, since their choices have no derivative.

    Args:
        unrolled_steps: K ≥ 1.

    The other arguments are those of `ParticleLoop`; the particles carry no weights.

    Raises:
        InvalidInputError: a kernel that rejects; an objective that is not differentiable in the particles.
    """

    def __init__(self, *args: Any, unrolled_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unrolled_steps = check_integer("unrolled_steps", unrolled_steps)
        _refuse_weights(self)
        if self.kernel.target_acceptance is not None:
            raise InvalidInputError(
                f"{type(self.kernel).__name__} accepts or rejects, which has no derivative; unroll ULA or Underdamped"
            )
        for weight, term in self.objective.stationary:
            if not isinstance(term, TerminalObjective):
                raise InvalidInputError(f"{type(term).__name__} has no derivative in the particles; use Single")
            if weight != 0:
                term.check_slope(self.particles)
        self.unrolled_steps = self.inner_steps = unrolled_steps

    def _words(self) -> Iterable[str]:
        return *super()._words(), f"unrolled_steps={self.unrolled_steps}"

    def step(self) -> dict[str, Any]:
        self.update.begin()
        start, walkers = self.iteration * self.unrolled_steps, self.walkers
        x, momentum, heights = walkers.x, walkers.momentum, list[Tensor]()
        with self.evaluating(), torch.enable_grad():
            for k in range(start, start + self.unrolled_steps):
                *numbers, _ = self._draws(k)
                here = self._differentiable_energy(x)
                heights.append(here.value.detach().sum())
                move = self.kernel.move(x, momentum, here, self._differentiable_energy, tuple(numbers), self._h(k))
                x, momentum = move.x, move.momentum
            values = {
                term.name: term.value(Particles(x))
                for _, term in self.objective.stationary
                if isinstance(term, TerminalObjective)
            }
            for weight, term in self.objective.stationary:
                if weight != 0 and not values[term.name].requires_grad:
                    raise InvalidInputError(f"{term.name} {LOST}")
            total = sum((c * values[term.name] for c, term in self.objective.stationary), start=0 * x.sum())
            gradients = torch.autograd.grad(total, self.parameters, allow_unused=True)
        self._hand_over(dense(gradients))
        self.iteration += 1
        self.evaluations += 2 * self.unrolled_steps * self.kernel.evaluations
        moved = innermost(x.detach()), None if momentum is None else momentum.detach()
        after = walkers._replace(x=moved[0], momentum=moved[1])
        values = {name: value.detach() for name, value in values.items()}
        info = self.update.step([after.x.sum(), *heights], lambda: self._diagnose(after, values))
        self.walkers = after
        return self._metrics(values) | info

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"unrolled_steps": self.unrolled_steps}

    def _differentiable_energy(self, x: Tensor) -> Energy:
        """V and ∇V as functions of x and θ."""
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = evaluate(self.model, x)
        (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return Energy(value, grad)


def _refuse_weights(loop: ParticleLoop) -> None:
    if loop.weighted or loop.lag:
        raise InvalidInputError(f"{type(loop).__name__} carries no weights; leave weighted and lag out, or use Single")
