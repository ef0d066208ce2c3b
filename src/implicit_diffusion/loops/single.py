"""The single loop: one step of the sampler and one step on θ per iteration.

    p ← Σ(p, θ)            one step of the kernel on the particles
    θ ← θ − η Γ(p, θ)      one optimizer step, with Γ = ∇_θ Σ_j c_j V_θ(y_j), the charges c held fixed

In the paper's order (Marion et al., arXiv 2402.05468, algorithm 2) both read (p_k, θ_k), so that one forward of V
serves both. The authors' released code moves the particles first and takes Γ at the new ones, `order="x-first"`, which
costs a second forward. `single_compiled` says how several iterations become one compiled call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim

from implicit_diffusion import processes
from implicit_diffusion.compiled import Compiled
from implicit_diffusion.errors import InvalidInputError, check_integer, check_number, check_type, shown
from implicit_diffusion.gradients.adjoint_measure import AdjointSolver
from implicit_diffusion.gradients.fused import GIBBS, Fused, fused_pass, one_pull
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.loops.single_compiled import Inputs, Iteration, in_one_call, iteration_of
from implicit_diffusion.loops.step_rules.watched_weights import Segment, log_weights_of, shorten
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.potentials.energy import Energy, energy_of
from implicit_diffusion.potentials.inner_problem import field_at
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import Kernel
from implicit_diffusion.samplers.weighted_state import WeightedState, effective, exhausted, reweighted, settled


class Single(ParticleLoop):
    """One kernel step and one optimizer step per iteration.

        >>> import torch
        >>> from implicit_diffusion import ULA, GaussianMixture, Noise, Reward, Single
        >>> potential = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
        >>> sgd = torch.optim.SGD([potential.logits], lr=0.5)
        >>> loop = Single(potential, ULA(0.1), Reward(lambda x: x[:, 0]), sgd, particles=1000, noise=Noise(0))
        >>> for _ in range(100):
        ...     metrics = loop.step()
        >>> print(f"{potential.weights[1]:.1f}")  # the right mode has the larger reward
        1.0

    Args:
        potential: V, an `nn.Module` (n, *event) → (n,), trained in place.
        kernel: the sampler's step, e.g. `ULA(0.1)`.
        objective: F, which is minimised, e.g. `Reward(r)` or `ForwardKL(data)`.
        update: a torch optimizer of the potential's parameters, or an `Update` around one.
        particles: X_0, with shape (n, *event); or n, to draw X_0 ~ π_θ with the potential's own `sample(n, noise)`.
        noise: source of every random number.
        weighted: weigh the particles so that averages are exact although θ moves, resample them when fewer than half
            of them are effective, and keep log Z. X_0 must then be draws from π_θ.
        lag: also report by how much unweighted particles lag behind π_θ.
        min_ess: shorten every step of the optimizer, where necessary, such that more than this share of weighted
            particles stays effective (`step_rules`): a share below the half at which they are resampled, such as 0.3.
            A check costs V at the particles, and a pull with `ULA`, whose own step changes the weights too.
        order: "paper" reads particles and θ once for both steps; "x-first" moves the particles, then takes Γ at the
            new ones.
        compiled: compile the iteration with `torch.compile`, in full or not at all (`loop.compiled.reason` says why
            not); not at all where several processes share the particles. Where an update is the optimizer's step and
            nothing else, it is compiled along, from the second call on: the first one creates the optimizer's state.
        iterations: how many one `step()` makes; its metrics are those of the last one. For small problems, where the
            calls themselves are what costs. θ moves in each iteration.
        solver: from the objective's first variations to the charges, e.g. of an inner problem of your own; if None,
            that of the potential: the closed form, or `ConjugateGradients` for an `InnerProblem` such as `MeanField`.

    Raises:
        InvalidInputError: an argument that does not fit the others; several iterations per step that would skip a
            schedule, average, accumulation or the check of `min_ess`.
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
        min_ess: float | None = None,
        order: Literal["paper", "x-first"] = "paper",
        compiled: bool = False,
        iterations: int = 1,
        solver: AdjointSolver | None = None,
    ) -> None:
        super().__init__(
            potential,
            kernel,
            objective,
            update,
            particles=particles,
            noise=noise,
            weighted=weighted,
            lag=lag,
            solver=solver,
        )
        if not isinstance(order, str) or order not in ("paper", "x-first"):
            raise InvalidInputError(f'order must be "paper" or "x-first", got {shown(order)}')
        check_type("compiled", compiled, bool, "use True or False")
        self.min_ess = None if min_ess is None else check_number("min_ess", min_ess, 0, 0.5, note=", or None")
        if self.min_ess is not None and not weighted:
            raise InvalidInputError("min_ess is a share of weighted particles; use weighted=True, or leave it out")
        optimizer_only = self.update.optimizer_only and self.min_ess is None
        iterations = check_integer("iterations", iterations, 0, 10**6)
        if iterations < 1 or (iterations > 1 and not optimizer_only):
            raise InvalidInputError(
                f"iterations must be 1, got {iterations}: a step can make several only where an update is the "
                "optimizer's step and nothing else (no schedule, clipping, average, accumulation or min_ess)"
            )
        self.order, self.iterations = order, iterations
        self._updates_inside = iterations > 1 or (compiled and optimizer_only)
        self._choose(compiled)

    def _choose(self, compiled: bool) -> None:
        """Choose the function that makes the iterations of one call."""
        function: Callable[..., Iteration] = self._in_one_call if self._updates_inside else self._iterate
        self.compiled = Compiled(function) if compiled else None
        self._function = self.compiled or function
        if self.compiled is not None and (reason := self._eager_because()):
            self.compiled.stay_eager(reason)
            self._function = function

    def _eager_because(self) -> str | None:
        """Why the iteration is not compiled."""
        if processes.world_size() > 1:
            return "several processes exchange numbers within an iteration"
        return None if self.solver is GIBBS else "a solve for the charges looks at its residual"

    def _words(self) -> Iterable[str]:
        yield from super()._words()
        if self.min_ess is not None:
            yield f"min_ess={self.min_ess:g}"
        if self.order != "paper":
            yield f"order={self.order!r}"
        if self.compiled is not None:
            yield "compiled" if self.compiled.reason is None else "not compiled"
        if self.iterations > 1:
            yield f"{self.iterations} iterations per step"

    @processes.sharing()
    def step(self) -> dict[str, Any]:
        first, count = self.iteration, self.iterations
        inputs = [(self._draws(k), self._points(k), self._h(k)) for k in range(first, first + count)]
        self.iteration += count
        self.gradient_evaluations += count * self._evaluations_per_iteration
        done, moved = self._iterations_in_one_call(inputs) if self._updates_inside else self._one_iteration(*inputs)
        self._state = done.state
        return self._metrics(done.values) | done.info | self.solver.take_info() | moved

    def _one_iteration(self, inputs: Inputs) -> tuple[Iteration, dict[str, Any]]:
        """An iteration, then its update of θ."""
        self.update.begin()
        with self.evaluating():
            done = self._function(self._state, *inputs)
        self._hand_over(done.gradients)
        shorten = None if self.min_ess is None else partial(self._shorten, done.state, self.min_ess * self.n)
        diagnose = partial(self._diagnose, done.state, done.values)
        return done, self.update.step([done.alarm], diagnose, done.norm, shorten)

    def _shorten(self, state: WeightedState, least: float, segment: Segment) -> float:
        """Keep `least` particles effective in the state that an update follows; the share of the update's step made."""
        with self.evaluating():
            share, evaluations = shorten(segment, lambda: log_weights_of(self.kernel, self.model, state), least)
        self.gradient_evaluations += evaluations * self.kernel.weighs_by_gradient
        return share

    def _iterations_in_one_call(self, inputs: list[Inputs]) -> tuple[Iteration, dict[str, Any]]:
        """Iterations with their updates of θ. The first call creates the optimizer's state, and is not compiled."""
        function = self._in_one_call if self.update.updates == 0 else self._function
        with self.evaluating():
            done = function(self._state, inputs)
        moved = self.update.account(
            done.alarm, lambda: self._diagnose(done.state, done.values), done.norm, len(inputs), done.overflow
        )
        return done, moved

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"order": self.order}

    @property
    def _evaluations_per_iteration(self) -> int:
        """Pulls through V: the kernel's, one for Γ where it needs its own, and one at the particles of x-first."""
        shared = not self.keeps_weights and one_pull(self.objective.stationary, self.solver)
        return self.kernel.evaluations_per_step + (not shared) + (self.order == "x-first")

    def _in_one_call(self, state: WeightedState, inputs: list[Inputs]) -> Iteration:
        return in_one_call(self._iterate, self.update, self.parameters, state, inputs)

    def _iterate(
        self, state: WeightedState, draws: tuple[Tensor, ...], points: list[Tensor | None], h: Tensor
    ) -> Iteration:
        return (self._paper_order if self.order == "paper" else self._x_first)(state, draws, points, h)

    def _paper_order(
        self, state: WeightedState, draws: tuple[Tensor, ...], points: list[Tensor | None], h: Tensor
    ) -> Iteration:
        """Γ and the move, both at (p_k, θ_k)."""
        state, fused, info = self._gradient(state, points)
        moved, of_move = self._move(state, fused.here, draws, h)
        return iteration_of(moved, fused, info, of_move, self.runs)

    def _x_first(
        self, state: WeightedState, draws: tuple[Tensor, ...], points: list[Tensor | None], h: Tensor
    ) -> Iteration:
        """The move, then Γ at the new particles."""
        here = energy_of(field_at(self.model, state.x), state.x)
        if self.keeps_weights:
            state = self._reweighted(state, here)
        state, of_move = self._move(state, here, draws, h)
        state, fused, info = self._gradient(state, points)
        state = self.runs.each(settled)(state, fused.here.value)
        return iteration_of(state, fused, info, of_move, self.runs)

    def _reweighted(self, state: WeightedState, here: Energy) -> WeightedState:
        """The state with weights under the θ of `here`, V and ∇V at the particles."""
        under: WeightedState = self.runs.each(partial(reweighted, self.kernel))(state, here)
        return under

    def _gradient(
        self, state: WeightedState, points: list[Tensor | None]
    ) -> tuple[WeightedState, Fused, dict[str, Any]]:
        """V, ∇V and Γ from one pass, the weights under the present θ, and their diagnostics."""
        terms, field, runs = self.objective.stationary, field_at(self.model, state.x), self.runs
        if not self.keeps_weights:
            return state, fused_pass(field, self.parameters, terms, state.x, points, None, self.solver, runs), {}
        under = state

        def weigh(here: Energy) -> Any:
            nonlocal under
            under = self._reweighted(state, here)
            return self._as_particles(under)

        fused = fused_pass(field, self.parameters, terms, state.x, points, weigh, self.solver, runs)
        if not self.weighted:
            of_run = runs.each(partial(lag_of, same_charges=self.solver.same_charges(terms)))
            under, lag = of_run(under, fused.here.value, fused.charges.detach())
            return under, fused, {"lag": lag}
        particles = fused.particles
        log_z = {"log_z_growth": particles.log_z_growth} if particles.log_z is None else {"log_z": particles.log_z}
        return under, fused, {"ess": runs.each(effective)(particles.log_weights)} | log_z


def lag_of(
    state: WeightedState, value: Float[Tensor, " n"], charges: Float[Tensor, " n"], *, same_charges: bool
) -> tuple[WeightedState, Tensor]:
    """The lag of particles whose weights only inform about it; the weights are reset once they are exhausted.

    The lag is by how many standard deviations the weighted mean of V, or of the charges, differs from the plain one.
    Particles that keep up have weights that say nothing about where they are, and no lag however spread the weights.
    Weights start anew when fewer than half of the particles are effective; the lag that they showed then stays on
    record until the next time.

    Args:
        state: with weights under the present θ.
        value: V there.
        charges: of the particles.
        same_charges: whether all charges are equal, so that they say nothing.
    """
    w = torch.softmax(exact(state.log_weights), 0)
    values = [value] if same_charges else [value, charges]
    everywhere = processes.gathered(torch.stack([exact(each) for each in values]), 1)
    differences = (everywhere @ w - everywhere.mean(1)).abs() / everywhere.std(1).clamp(min=1e-12)
    lag = differences.amax().to(state.lag)
    due = exhausted(state.log_weights)
    kept = state._replace(log_weights=torch.where(due, 0.0, state.log_weights), lag=torch.where(due, lag, state.lag))
    return kept, torch.maximum(lag, state.lag)
