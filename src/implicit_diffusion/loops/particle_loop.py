"""What the loops over stationary samplers share: particles, their weights, and the noise that moves them.

Several processes run one loop together: each keeps n/W of the particles, moves them by its rows of the noise of all,
and computes its part of Γ. `weighted_state`, `particles` and `refresh` speak of all n particles, and wait for all
processes: every one of them reads or calls these whenever one does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn, optim

from implicit_diffusion import processes
from implicit_diffusion.errors import check_integer, check_type, trying
from implicit_diffusion.frozen import eval_mode, refuse_inference_mode
from implicit_diffusion.gradients.adjoint_measure import AdjointSolver
from implicit_diffusion.gradients.fused import ONE
from implicit_diffusion.loops.base import Loop, check_same
from implicit_diffusion.loops.given_particles import check_parts, initial_particles, replacing_particles, solver_of
from implicit_diffusion.loops.nonfinite import what_failed
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import GibbsObjective, Objective, ReverseKL
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import Energy, check_potential, coarse, energy_of, known_log_z, precision
from implicit_diffusion.potentials.inner_problem import field_at
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.draws import Blocks, innermost
from implicit_diffusion.samplers.kernel import Info, Kernel, Step
from implicit_diffusion.samplers.resolution import check_resolved
from implicit_diffusion.samplers.weighted_state import (
    WeightedState,
    all_rows,
    check_together,
    exact_draws,
    log_mean_exp,
    own_rows,
    resample,
    reweighted,
)
from implicit_diffusion.showing import of_tensor

KERNEL, DATA, START, CHECK = range(4)  # streams of noise


class ParticleLoop(Loop):
    """A loop over particles that a Markov kernel moves.

    Args:
        potential: V, an `nn.Module` (n, *event) → (n,), trained in place.
        kernel: the sampler's step, e.g. `ULA(0.1)`.
        objective: F, which is minimised, e.g. `Reward(r)` or `ForwardKL(data)`.
        update: a torch optimizer of the potential's parameters, or an `Update` around one.
        particles: X_0, with shape (n, *event); or n, to draw X_0 ~ π_θ with the potential's own `sample(n, noise)`.
            Several processes are given all n each, and share them equally.
        noise: source of every random number.
        weighted: weigh the particles so that averages are exact although θ moves, resample them when fewer than half
            of them are effective, and keep log Z. X_0 must then be draws from π_θ.
        lag: also report by how much unweighted particles lag behind π_θ.
        solver: from the objective's first variations to the charges; if None, the one of the potential's inner problem.

    Attributes:
        gradient_evaluations: how often this loop has pulled through V at all the particles, for the sampler or for Γ.
            What else evaluates V (diagnostics, other loops) is not counted here.
        inner_steps: steps of the kernel per iteration.
        step_scale: a factor of the kernel's step sizes, which `AdaptStep` moves.
        log_z0: log Z at the start; None where it is not known.

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
        weighted: bool = False,
        lag: bool = False,
        solver: AdjointSolver | None = None,
    ) -> None:
        check_type("kernel", kernel, Kernel, "use ULA(0.1), for example")
        check_type("weighted", weighted, bool, "use True or False")
        check_type("lag", lag, bool, "use True or False")
        super().__init__(potential, "potential", objective, update, noise)
        self.kernel, self.weighted, self.lag = kernel, weighted, lag
        self.inner_steps, self.step_scale, self.runs = 1, 1.0, ONE
        check_parts(kernel, objective, keeps_weights=weighted or lag)
        x = initial_particles(self.model, particles, noise.stream(START, 0))
        processes.check_divides("particles", len(x))
        check_same(noise, particles=x)
        check_resolved(kernel, x, 0)
        self.solver = solver_of(self.model, kernel, x, solver, objective, keeps_weights=weighted or lag)
        self.parameters = [p for p in self.update.parameters if p.requires_grad]
        with self.evaluating():
            check_potential(field_at(self.model, x), x)
            value = energy_of(field_at(self.model, x), x).value
            for _, term in objective.stationary:
                with trying(term.name, "the initial particles"):  # it may write into what it is given
                    term.check_stationary(Particles(x.clone()), value)
            self.objective = objective.starting_at(Particles(x.clone()), value)
        if (warning := coarse(value, precision(potential, x))) and self.values_matter:
            warnings.warn(warning, stacklevel=3)
        self.weighted_state = exact_draws(kernel.start(x, noise.generator(START, 1, device=x.device)), value)
        self.log_z0 = known_log_z(potential)
        self.gradient_evaluations, self._blocks = 0, Blocks(KERNEL)
        self._step_sizes: dict[float, Tensor] = {}

    def _words(self) -> Iterable[str]:
        yield f"{self.n} particles {of_tensor(self._state.x[0])}"
        yield from (name for name in ("weighted", "lag") if getattr(self, name))
        if self.step_scale != 1:
            yield f"step size={self.step_size:.3g}"
        yield from super()._words()

    def _parts(self) -> dict[str, object]:
        return {"potential": self.model, "kernel": self.kernel} | super()._parts()

    @property
    def n(self) -> int:
        """The number of particles."""
        return len(self._state.x) * processes.world_size()

    @property
    @processes.sharing()
    def weighted_state(self) -> WeightedState:
        """The particles between two iterations, of all processes, with their weights where the loop keeps them."""
        return all_rows(self._state)

    @weighted_state.setter
    @processes.sharing()
    def weighted_state(self, whole: WeightedState) -> None:
        self._state = own_rows(whole)

    @property
    @processes.sharing()
    def particles(self) -> Particles:
        """The present particles of all processes; in a weighted loop with weights and log Z of the present θ."""
        check_together(state := self._state)
        if self.weighted:
            with eval_mode(self.model):
                state = reweighted(self.kernel, state, energy_of(self.model, state.x))
        own: Particles = self._as_particles(state)
        return own.whole()

    @property
    def step_size(self) -> float:
        """The scaled step size of the kernel's last step; of its first one where none has been made."""
        return self.step_scale * self.kernel.step_size_at(max(0, self.iteration * self.inner_steps - 1))

    @property
    def keeps_weights(self) -> bool:
        """Whether log-weights are kept, to weigh the particles with or to report their lag."""
        return self.weighted or self.lag

    @property
    def values_matter(self) -> bool:
        """Whether V itself matters, beside its gradients: for acceptance, weights or the objective."""
        in_objective = any(isinstance(term, ReverseKL) for _, term in self.objective.stationary)
        return self.keeps_weights or in_objective or self.kernel.target_acceptance is not None

    def evaluating(self) -> AbstractContextManager[None]:
        """Context in which V and the objective are deterministic functions (eval mode), restored on exit."""
        refuse_inference_mode()
        return eval_mode(self.model, *(network for _, term in self.objective.terms for network in term.networks()))

    def refresh(self, particles: Particles, *, gradient_evaluations: int = 0) -> None:
        """Continue from other particles that represent the present π_θ: draws, weighted or not, e.g. from `annealed`.

        What the old ones accumulated (weights, errors of log Z and of the masses of modes) ends with them. Log Z
        continues from the new ones' log Z, or from that of the old ones where the new ones carry none.

        Args:
            particles: the new particles, with the number, shape, dtype and device of the old ones.
            gradient_evaluations: what the new particles have cost, which is added to the loop's own work.

        Raises:
            InvalidInputError: particles of another number, shape, dtype or device, or not finite; weights in a loop
                without weights.
        """
        check_integer("gradient_evaluations", gradient_evaluations, 0)
        present = self.weighted_state
        x, log_weights = replacing_particles(particles, present.x, self.weighted)
        with eval_mode(self.model):
            value = energy_of(self.model, x).value
        log_weights = log_weights - log_mean_exp(log_weights)
        growth = self.particles.log_z_growth if self.weighted else present.log_z
        assert growth is not None
        if particles.log_z is not None:
            self.log_z0 = float(particles.log_z - growth) if self.log_z0 is None else self.log_z0
            growth = (particles.log_z - self.log_z0).to(growth)
        zero = x.new_zeros(())
        self.weighted_state = WeightedState(x, present.momentum, log_weights, growth, x, exact(value), h=zero, lag=zero)
        self.gradient_evaluations += gradient_evaluations

    def cost(self) -> dict[str, int]:
        return {"gradient_evaluations": self.gradient_evaluations}

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("log_z0", "gradient_evaluations", "step_scale")}
        parts = {"weighted_state": self.weighted_state._asdict(), "solver_state": self.solver.state_dict()}
        return super().state_dict() | parts | own

    def _like(self) -> dict[str, Any]:
        own = {"particles": [self.n, *self._state.x.shape[1:]], "kernel": type(self.kernel).__name__}
        return super()._like() | own | {"weighted": self.weighted, "lag": self.lag}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        older = {"step_scale": 1.0, "solver_state": {}}
        super().load_state_dict(older | dict(state) if isinstance(state, Mapping) else state)

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        old, new = self._state._asdict(), state["weighted_state"]
        saved: dict[str, Any] = {k: v if v is None else innermost(v.to(old[k])) for k, v in new.items()}
        self.weighted_state = WeightedState(**saved)
        self.__dict__ |= {name: state[name] for name in ("log_z0", "gradient_evaluations", "step_scale")}
        self.solver.load_state_dict(state["solver_state"])
        self._blocks.forget()

    def _as_particles(self, state: WeightedState) -> Any:
        """The state as this process's particles, weighted where the loop is; a copy, which objectives may write into.

        Args:
            state: with weights under the present θ.
        """
        x = state.x.clone()
        if not self.weighted:
            return Particles(x)
        growth = state.log_z + self.runs.each(log_mean_exp)(state.log_weights)
        log_z = None if self.log_z0 is None else exact(growth) + self.log_z0
        return self.runs.particles(x, state.log_weights, log_z, growth)

    def _draws(self, iteration: int) -> tuple[Tensor, ...]:
        """The random numbers of one step of the sampler: the kernel's, and one U(0, 1) for resampling."""
        return self._blocks.at(iteration, self.kernel.draws, self.noise, self._state.x)

    def _points(self, iteration: int) -> list[Tensor | None]:
        """For every term of the objective the points besides the particles that it charges, in all processes alike."""
        if not any(type(term).draw is not GibbsObjective.draw for _, term in self.objective.stationary):
            return [None for _ in self.objective.stationary]
        generator = self.noise.generator(DATA, iteration, device=self._state.x.device)
        return [term.draw(generator) for _, term in self.objective.stationary]

    def _h(self, k: int) -> Tensor:
        """The step size of the kernel's k-th step as a tensor."""
        h = self.step_scale * self.kernel.step_size_at(k)
        check_resolved(self.kernel, self._state.x, k, self.step_scale)
        if h not in self._step_sizes:
            self._step_sizes = {h: self._state.x.new_tensor(h)}
        return self._step_sizes[h]

    def _move(
        self, state: WeightedState, here: Energy, draws: tuple[Tensor, ...], h: Tensor
    ) -> tuple[WeightedState, Info]:
        """One step of the kernel, after resampling where the weights call for it.

        Args:
            state: with weights under the present θ, where the loop keeps any.
            here: V and ∇V at the particles.
            draws: as `_draws` returned them.
            h: the step size.
        """
        *numbers, uniform = draws
        if self.weighted:
            state, here = self.runs.each(resample)(state, here, uniform)
        step = Step(state.x, state.momentum, here, lambda y: energy_of(self.model, y), tuple(numbers), h)
        step = self.runs.step(step)
        after, info = self.kernel.move(step)
        momentum = None if after.momentum is None else self.runs.stacked(innermost(after.momentum))
        x = self.runs.stacked(innermost(after.x))  # one layout: a resumed run rounds the same
        moved = state._replace(x=x, momentum=momentum)
        if self.keeps_weights:
            forward = self.runs.stacked(self.kernel.forward_part(step, after))
            moved = moved._replace(previous=state.x, forward_part=forward, h=h.expand(state.h.shape).clone())
        return moved, info

    def _hand_over(self, gradients: Iterable[Tensor | None]) -> None:
        """Add this process's part of Γ to the parameters' `.grad`."""
        for p, g in zip(self.parameters, gradients):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g

    def _diagnose(self, state: WeightedState, values: dict[str, Tensor]) -> str | None:
        """What was NaN or infinite in the last iteration, which led to `state`, in words; None where nothing was."""
        terms = zip(self.objective.stationary, self._points(self.iteration - 1), strict=True)
        x = all_rows(state).x
        places = [("particles", self.weighted_state.x), ("particles", x)]
        places += [(f"data of {term.name}", y) for (_, term), y in terms if y is not None]
        reason = what_failed(self.model, x, places, self.particles.ess if self.weighted else None)
        return f"iteration {self.iteration - 1}: {reason}" if reason else self._bad_value(values)
