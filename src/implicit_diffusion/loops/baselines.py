"""What the single loop is compared with: the nested loop and the unrolled sampler, over the same particles and kernels.

They exist for comparisons at equal work (`gradient_evaluations`, pulls through V at all the particles) and at equal
wall-clock time, and are not defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_choice, check_integer
from implicit_diffusion.gradients.adjoint import LOST
from implicit_diffusion.gradients.adjoint_measure import Terms
from implicit_diffusion.gradients.fused import dense, fused_pass
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.loops.single_compiled import Iteration, iteration_of
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective, TerminalObjective
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import Energy, energy_of, value_of
from implicit_diffusion.potentials.inner_problem import InnerProblem, field_at
from implicit_diffusion.samplers.draws import innermost
from implicit_diffusion.samplers.kernel import Kernel, Step
from implicit_diffusion.samplers.weighted_state import WeightedState

Begin = Literal["initial", "last", "data"]


class NestedParticles(ParticleLoop):
    """Run the sampler first, then make one update: T steps of the kernel under one θ, and Γ at the last particles.

        >>> import torch
        >>> from implicit_diffusion import ULA, GaussianMixture, Noise, Reward
        >>> from implicit_diffusion.loops import NestedParticles
        >>> potential = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
        >>> sgd, reward = torch.optim.SGD([potential.logits], lr=0.5), Reward(lambda x: x[:, 0])
        >>> loop = NestedParticles(
        ...     potential, ULA(0.1), reward, sgd, particles=1000, noise=Noise(0), inner_steps=10, begin="last"
        ... )
        >>> loop.step()["gradient_evaluations"]  # ten for the sampler and one for Γ
        11

    Args:
        potential: V, an `nn.Module` (n, *event) → (n,), trained in place.
        kernel: the sampler's step, e.g. `ULA(0.1)`.
        objective: F, which is minimised, e.g. `Reward(r)` or `ForwardKL(data)`.
        update: a torch optimizer of the potential's parameters, or an `Update` around one.
        particles: X_0, with shape (n, *event); or n, to draw X_0 ~ π_θ with the potential's own `sample(n, noise)`.
        noise: source of every random number.
        inner_steps: T ≥ 1.
        begin: where each run of the sampler starts. "initial": at X_0; "last": where the run before ended (persistent
            contrastive divergence); "data": at the draw of the objective that has data (contrastive divergence,
            Hinton, 2002).

    Raises:
        InvalidInputError: an argument that does not fit the others; the message says which.
    """

    def __init__(
        self,
        potential: nn.Module,
        kernel: Kernel,
        objective: Objective,
        update: Update | optim.Optimizer,
        *,
        particles: Float[Tensor, "n *event"] | int,
        noise: Noise,
        inner_steps: int,
        begin: Begin = "initial",
    ) -> None:
        super().__init__(potential, kernel, objective, update, particles=particles, noise=noise)
        inner_steps = check_integer("inner_steps", inner_steps)
        check_choice("begin", begin, get_args(Begin))
        self.inner_steps, self.begin, self.initial = inner_steps, begin, self._state
        if begin == "data" and len(self._data(self._points(0))) != self.n:
            raise InvalidInputError(
                f'begin="data" needs as many particles as data per estimate, got {self.n} and '
                f"{len(self._data(self._points(0)))}; set the batch of the objective"
            )

    def _words(self) -> Iterable[str]:
        return *super()._words(), f"inner_steps={self.inner_steps}", f"begin={self.begin!r}"

    @processes.sharing()
    def step(self) -> dict[str, Any]:
        self.update.begin()
        points, steps = self._points(self.iteration), _kernel_steps(self)
        with self.evaluating():
            done = self._iterate(self._state, map(self._draws, steps), points, map(self._h, steps))
        self._hand_over(done.gradients)
        self.iteration += 1
        self.gradient_evaluations += self._evaluations_per_iteration
        moved = self.update.step([done.alarm], lambda: self._diagnose(done.state, done.values))
        self._state = done.state
        return self._metrics(done.values) | done.info | self.solver.take_info() | moved

    def _iterate(
        self,
        state: WeightedState,
        draws: Iterable[tuple[Tensor, ...]],
        points: list[Tensor | None],
        step_sizes: Iterable[Tensor],
    ) -> Iteration:
        """T steps of the kernel, and Γ where they end."""
        if self.begin == "initial":
            state = self.initial
        elif self.begin == "data":
            state = state._replace(x=innermost(processes.share(self._data(points))))
        for numbers, h in zip(draws, step_sizes):
            here = energy_of(field_at(self.model, state.x), state.x)
            state, info = self._move(state, here, numbers, h)
        field, terms = field_at(self.model, state.x), self.objective.stationary
        fused = fused_pass(field, self.parameters, terms, state.x, points, None, self.solver, self.runs)
        return iteration_of(state, fused, {}, info, self.runs)

    @property
    def _evaluations_per_iteration(self) -> int:
        return self.inner_steps * self.kernel.evaluations_per_step + 1

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

        >>> import torch
        >>> from implicit_diffusion import ULA, GaussianMixture, Noise, Reward
        >>> from implicit_diffusion.loops import Unrolled
        >>> potential = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
        >>> sgd, reward = torch.optim.SGD([potential.logits], lr=0.5), Reward(lambda x: x[:, 0])
        >>> loop = Unrolled(potential, ULA(0.1), reward, sgd, particles=1000, noise=Noise(0), unrolled_steps=10)
        >>> loop.step()["gradient_evaluations"]  # ten forth and ten back
        20

    Args:
        potential: V, an `nn.Module` (n, *event) → (n,), trained in place.
        kernel: the sampler's step, `ULA` or `Underdamped`.
        objective: F, which is minimised, differentiable in the particles.
        update: a torch optimizer of the potential's parameters, or an `Update` around one.
        particles: X_0, with shape (n, *event); or n, to draw X_0 ~ π_θ with the potential's own `sample(n, noise)`.
        noise: source of every random number.
        unrolled_steps: K ≥ 1.

    Raises:
        InvalidInputError: a kernel that rejects; an objective that is not differentiable in the particles; else an
            argument that does not fit the others.
    """

    def __init__(
        self,
        potential: nn.Module,
        kernel: Kernel,
        objective: Objective,
        update: Update | optim.Optimizer,
        *,
        particles: Float[Tensor, "n *event"] | int,
        noise: Noise,
        unrolled_steps: int,
    ) -> None:
        super().__init__(potential, kernel, objective, update, particles=particles, noise=noise)
        unrolled_steps = check_integer("unrolled_steps", unrolled_steps)
        if isinstance(self.model, InnerProblem):
            raise InvalidInputError(f"{type(self.model).__name__} holds its field fixed within a step; use Single")
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

    @processes.sharing()
    def step(self) -> dict[str, Any]:
        self.update.begin()
        steps = _kernel_steps(self)
        with self.evaluating():
            done = self._iterate(self._state, map(self._draws, steps), [], map(self._h, steps))
        self._hand_over(done.gradients)
        self.iteration += 1
        self.gradient_evaluations += self._evaluations_per_iteration
        info = self.update.step([done.alarm], lambda: self._diagnose(done.state, done.values))
        self._state = done.state
        return self._metrics(done.values) | info

    @torch.enable_grad()
    def _iterate(
        self,
        state: WeightedState,
        draws: Iterable[tuple[Tensor, ...]],
        points: list[Tensor | None],
        step_sizes: Iterable[Tensor],
    ) -> Iteration:
        """K steps of the kernel with θ in the graph, and ∇_θ F where they end."""
        x, momentum, alarms, runs = state.x, state.momentum, list[Tensor](), self.runs
        for (*numbers, _), h in zip(draws, step_sizes):
            here = self._differentiable_energy(x)
            alarms.append(here.value.detach().sum())
            step = runs.step(Step(x, momentum, here, self._differentiable_energy, tuple(numbers), h))
            after, _ = self.kernel.move(step)
            x, momentum = runs.stacked(after.x), None if after.momentum is None else runs.stacked(after.momentum)
        values = runs.of_terms(_values, self.objective.stationary)(x)
        for weight, term in self.objective.stationary:
            if weight != 0 and not values[term.name].requires_grad:
                raise InvalidInputError(f"{term.name} {LOST}")
        total = sum((c * values[term.name].sum() for c, term in self.objective.stationary), start=0 * x.sum())
        gradients = dense(torch.autograd.grad(total, self.parameters, allow_unused=True))
        momentum = None if momentum is None else momentum.detach()
        x = runs.stacked(innermost(runs.flat(x.detach())))
        values = {name: value.detach() for name, value in values.items()}
        norm = runs.norm([g for g in gradients if g is not None])
        return Iteration(
            state._replace(x=x, momentum=momentum), gradients, values, {}, norm, sum(alarms, start=x.sum())
        )

    @property
    def _evaluations_per_iteration(self) -> int:
        return 2 * self.unrolled_steps * self.kernel.evaluations_per_step

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"unrolled_steps": self.unrolled_steps}

    def _differentiable_energy(self, x: Tensor) -> Energy:
        """V and ∇V as functions of x and θ."""
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = value_of(self.model, x)
        (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return Energy(value, grad)


def _values(terms: Terms, x: Float[Tensor, "n *event"]) -> dict[str, Tensor]:
    """The value of every term at the particles of one run, differentiable in them."""
    return {term.name: term.shared_value(Particles(x)) for _, term in terms if isinstance(term, TerminalObjective)}


def _kernel_steps(loop: ParticleLoop) -> range:
    """The kernel's steps in the next iteration."""
    return range(loop.iteration * loop.inner_steps, (loop.iteration + 1) * loop.inner_steps)
