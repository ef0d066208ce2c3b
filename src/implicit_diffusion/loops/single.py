"""The single loop: one step of the sampler and one step on θ per iteration.

    p ← Σ(p, θ)            one step of the kernel on the particles
    θ ← θ − η Γ(p, θ)      one optimizer step, with Γ = ∇_θ Σ_j c_j V_θ(y_j), the charges c held fixed

In the paper's order (Marion et al., arXiv 2402.05468, algorithm 2) both read (p_k, θ_k), so that one forward of V
serves both. The authors' released code moves the particles first and takes Γ at the new ones, `order="x-first"`, which
costs a second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_diffusion.compiled import Compiled
from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, shown
from implicit_diffusion.gradients.fused import GIBBS, Fused, fused_pass, one_pull
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import Energy, energy_of
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.walkers import Walkers, close, exhausted


class Single(ParticleLoop):
    """One kernel step and one optimizer step per iteration.

    Args:
        order: "paper" reads particles and θ once for both steps; "x-first" moves the particles, then takes Γ at the
            new ones.
        compiled: compile the inner update with `torch.compile`, in full or not at all (`loop.compiled.reason`). Where
            an update is the optimizer's step and nothing else, it is compiled along, from the second call on: the
            first creates the optimizer's state.
        iterations: made by one `step()`, whose metrics are those of the last; for small problems, where the cost is
            that of the calls. θ moves in each of them.

    The other arguments are those of `ParticleLoop`.

    Raises:
        InvalidInputError: also where several iterations per step would skip a schedule, average or accumulation.
    """

    def __init__(
        self,
        *args: Any,
        order: Literal["paper", "x-first"] = "paper",
        compiled: bool = False,
        iterations: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(order, str) or order not in ("paper", "x-first"):
            raise InvalidInputError(f'order must be "paper" or "x-first", got {shown(order)}')
        check_type("compiled", compiled, bool, "take True or False")
        iterations = check_integer("iterations", iterations, 0, 10**6)
        if iterations < 1 or (iterations > 1 and not self.update.plain):
            raise InvalidInputError(
                f"iterations must be 1, got {iterations}: a step can make several only where an update is the "
                "optimizer's step and nothing else (no schedule, clipping, average or accumulation)"
            )
        self.order, self.iterations = order, iterations
        self._inner = self._paper if order == "paper" else self._x_first
        self._plain = iterations > 1 or (compiled and self.update.plain)
        function: Callable[..., Any] = self._several if self._plain else self._inner
        self.compiled = Compiled(function) if compiled else None
        self._function = self.compiled or function

    def _words(self) -> Iterable[str]:
        yield from super()._words()
        if self.order != "paper":
            yield f"order={self.order!r}"
        if self.compiled is not None:
            yield "compiled" if self.compiled.reason is None else "not compiled"
        if self.iterations > 1:
            yield f"{self.iterations} iterations per step"

    def step(self) -> dict[str, Any]:
        first, count = self.iteration, self.iterations
        inputs = [(self._draws(k), self._points(k), self._h(k)) for k in range(first, first + count)]
        self.iteration += count
        self.evaluations += count * (self.kernel.evaluations + (not self._one_pull) + (self.order == "x-first"))
        with self.evaluating():
            if not self._plain:
                self.update.begin()
                walkers, gradients, info = self._function(self.walkers, *inputs[0])
                self._hand_over(gradients)
            elif self.update.updates == 0:
                walkers, info = self._several(self.walkers, inputs)
            else:
                walkers, info = self._function(self.walkers, inputs)
        values, alarm, norm = info.pop("values"), info.pop("alarm"), info.pop("norm")
        if self._plain:
            overflow = info.pop("overflow")
            moved = self.update.account(alarm, lambda: self._diagnose(walkers, values), norm, count, overflow)
        else:
            moved = self.update.step([alarm], lambda: self._diagnose(walkers, values), norm)
        self.walkers = walkers
        return self._metrics(values) | info | moved

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"order": self.order}

    @property
    def _one_pull(self) -> bool:
        return not self.tracked and one_pull(self.objective.stationary)

    def _several(
        self, walkers: Walkers, inputs: list[tuple[tuple[Tensor, ...], list[Tensor | None], Tensor]]
    ) -> tuple[Walkers, dict[str, Any]]:
        """Iterations with their updates of θ, none of which is made once something is not finite."""
        alarm = overflow = torch.zeros_like(walkers.log_z)
        for draws, points, h in inputs:
            walkers, gradients, info = self._inner(walkers, draws, points, h)
            alarm = alarm + info["alarm"] + info["norm"]
            overflow = overflow + self.update.masked(self.parameters, gradients, alarm.isfinite())
            alarm = alarm + overflow
        return walkers, info | {"alarm": alarm, "overflow": overflow}

    def _paper(
        self, walkers: Walkers, draws: tuple[Tensor, ...], points: list[Tensor | None], h: Tensor
    ) -> tuple[Walkers, tuple[Tensor | None, ...], dict[str, Any]]:
        walkers, fused, values = self._charge(walkers, points)
        moved, move = self._take(walkers, fused.here, draws, h)
        return moved, fused.gradients, values | _info(moved, fused, move.acceptance)

    def _x_first(
        self, walkers: Walkers, draws: tuple[Tensor, ...], points: list[Tensor | None], h: Tensor
    ) -> tuple[Walkers, tuple[Tensor | None, ...], dict[str, Any]]:
        here = energy_of(self.model, walkers.x)
        if self.tracked:
            walkers = close(self.kernel, walkers, here)
        walkers, move = self._take(walkers, here, draws, h)
        walkers, fused, values = self._charge(walkers, points)
        # The next increment is that of θ alone, at particles that stay where they are.
        settled = walkers._replace(previous=walkers.x, debt=exact(fused.here.value), h=torch.zeros_like(h))
        return settled, fused.gradients, values | _info(settled, fused, move.acceptance)

    def _charge(self, walkers: Walkers, points: list[Tensor | None]) -> tuple[Walkers, Fused, dict[str, Any]]:
        """One fused pass at the walkers, whose weights it closes, and what these tell."""
        terms = self.objective.stationary
        if not self.tracked:
            return walkers, fused_pass(self.model, self.parameters, terms, walkers.x, points), {}
        closed = walkers

        def weigh(here: Energy) -> Particles:
            nonlocal closed
            closed = close(self.kernel, walkers, here)
            return self._held(closed)

        fused = fused_pass(self.model, self.parameters, terms, walkers.x, points, weigh)
        if self.weighted:
            held = fused.particles
            values = {"log_z_growth": held.log_z_growth} if held.log_z is None else {"log_z": held.log_z}
            return closed, fused, {"ess": held.ess} | values
        closed, lag = forget(closed, fused, same_charges=GIBBS.same_charges(terms))
        return closed, fused, {"lag": lag}


def _info(walkers: Walkers, fused: Fused, acceptance: Tensor | None) -> dict[str, Any]:
    """Values of the terms, the norm of Γ, and one number that is finite if the particles, and V at them, are.

    Inductor fuses `vector_norm`, but not `_foreach_norm`, where it ends a kernel. The norm of Γ must not end one: the
    pulls in x and in θ would land in two, and each compute the same derivatives of V anew. At the end of an iteration
    a break is welcome: without it the intermediate results of all iterations of one call are alive together.
    """
    foreach = False if torch.compiler.is_compiling() else None
    norm = torch.nn.utils.get_total_norm([g for g in fused.gradients if g is not None], foreach=foreach)
    alarm = torch.nn.utils.get_total_norm([walkers.x.sum() + fused.total])
    info: dict[str, Any] = {"values": fused.values, "norm": norm, "alarm": alarm}
    return info if acceptance is None else info | {"acceptance": acceptance.mean()}


def forget(walkers: Walkers, fused: Fused, same_charges: bool) -> tuple[Walkers, Tensor]:
    """For particles that carry weights for information only: their lag, and the weights given up once exhausted.

    The lag is by how many standard deviations the weighted mean of V, or of the charges, differs from the plain one.
    Particles that keep up have weights that say nothing about where they are, and no lag however spread the weights.
    Weights begin anew when fewer than half of the particles are effective; the lag that they told then stays on record
    until the next time.

    Args:
        walkers: with weights closed under the present θ.
        fused: V and charges there.
        same_charges: whether all charges are the same, and tell nothing.
    """
    w = torch.softmax(exact(walkers.log_weights), 0)

    def difference(values: Tensor) -> Tensor:
        values = exact(values)
        return ((w @ values - values.mean()).abs() / values.std().clamp(min=1e-12)).to(walkers.lag)

    lag = difference(fused.here.value)
    if not same_charges:
        lag = torch.maximum(lag, difference(fused.charges.detach()))
    due = exhausted(walkers.log_weights)
    kept = walkers._replace(
        log_weights=torch.where(due, 0.0, walkers.log_weights), lag=torch.where(due, lag, walkers.lag)
    )
    return kept, torch.maximum(lag, walkers.lag)
