"""The single loop: one step of the sampler and one step on θ per iteration.

    p ← Σ(p, θ)            one step of the kernel on the particles
    θ ← θ − η Γ(p, θ)      one optimizer step, with Γ = ∇_θ Σ_j c_j V_θ(y_j), the charges c held fixed

In the paper's order (Marion et al., arXiv 2402.05468, algorithm 2) both read (p_k, θ_k), so that one forward of V
serves both. The authors' released code moves the particles first and takes Γ at the new ones, `order="x-first"`, which
costs a second forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.gradients.gibbs import Fused, fused_pass
from implicit_diffusion.loops.compiled import Compiled
from implicit_diffusion.loops.particle import ParticleLoop, Walkers, close, exhausted, log_mean_exp
from implicit_diffusion.potentials.energy import Energy, energy_of


class Single(ParticleLoop):
    """One kernel step and one optimizer step per iteration.

    Args:
        order: "paper" reads particles and θ once for both steps; "x-first" moves the particles, then takes Γ at the
            new ones.
        compiled: compile the inner update with `torch.compile`, in full or not at all (`loop.compiled.reason`).

    The other arguments are those of `ParticleLoop`.
    """

    def __init__(
        self, *args: Any, order: Literal["paper", "x-first"] = "paper", compiled: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if order not in ("paper", "x-first"):
            raise InvalidInputError(f'order must be "paper" or "x-first", got {order!r}')
        self.order = order
        inner = self._paper if order == "paper" else self._x_first
        self.compiled = Compiled(inner) if compiled else None
        self._inner = self.compiled or inner

    def step(self) -> dict[str, Any]:
        with eval_mode(self.model):
            walkers, gradients, info = self._inner(
                self.walkers, self._draws(self.iteration), self._points(self.iteration), self._h(self.iteration)
            )
        self._hand_over(gradients)
        self.iteration += 1
        self.evaluations += self.kernel.evaluations + (0 if self._one_pull else 1) + (self.order == "x-first")
        values = info.pop("values")
        moved = self.update.step([info.pop("alarm")], lambda: self._diagnose(walkers, values))
        self.walkers = walkers
        return self._metrics(values) | info | moved

    def run(self, updates: int) -> Iterator[dict[str, Any]]:
        while self.update.updates < updates:
            yield self.step()

    @property
    def _one_pull(self) -> bool:
        terms = self.objective.stationary
        return not (self.weighted or self.lag) and all(term.constant_charges for _, term in terms)

    def _paper(
        self, walkers: Walkers, draws: tuple[Tensor, ...], points: list[Tensor | None], h: Tensor
    ) -> tuple[Walkers, tuple[Tensor | None, ...], dict[str, Any]]:
        walkers, fused = self._charge(walkers, points)
        moved, move = self._take(walkers, fused.here, draws, h)
        return moved, fused.gradients, self._info(walkers, moved, fused, move.acceptance)

    def _x_first(
        self, walkers: Walkers, draws: tuple[Tensor, ...], points: list[Tensor | None], h: Tensor
    ) -> tuple[Walkers, tuple[Tensor | None, ...], dict[str, Any]]:
        here = energy_of(self.model, walkers.x)
        if self.weighted or self.lag:
            walkers = close(self.kernel, walkers, here)
        walkers, move = self._take(walkers, here, draws, h)
        walkers, fused = self._charge(walkers, points)
        # The next increment is that of θ alone, at particles that stay where they are.
        settled = walkers._replace(previous=walkers.x, debt=fused.here.value, h=torch.zeros_like(h))
        return settled, fused.gradients, self._info(walkers, settled, fused, move.acceptance)

    def _charge(self, walkers: Walkers, points: list[Tensor | None]) -> tuple[Walkers, Fused]:
        """One fused pass at the walkers, whose weights it closes."""
        terms = self.objective.stationary
        if not (self.weighted or self.lag):
            return walkers, fused_pass(self.model, self.parameters, terms, walkers.x, points)
        closed = walkers

        def weigh(here: Energy) -> tuple[Tensor | None, Tensor | None]:
            nonlocal closed
            closed = close(self.kernel, walkers, here)
            if not self.weighted:
                return None, None
            return closed.log_weights, self.log_z0 + closed.log_z + log_mean_exp(closed.log_weights)

        fused = fused_pass(self.model, self.parameters, terms, walkers.x, points, weigh)
        if self.lag and not self.weighted:
            closed = forget(closed, fused)
        return closed, fused

    def _info(self, before: Walkers, after: Walkers, fused: Fused, acceptance: Tensor | None) -> dict[str, Any]:
        """Values of the terms, diagnostics of the particles, and one number that is finite if all is well."""
        info: dict[str, Any] = {"values": fused.values, "alarm": after.x.sum() + fused.here.value.sum()}
        if acceptance is not None:
            info["acceptance"] = acceptance.mean()
        if self.weighted:
            info["ess"] = fused.particles.ess
            info["log_z"] = self.log_z0 + before.log_z + log_mean_exp(before.log_weights)
        if self.lag and not self.weighted:
            info["lag"] = before.lag
        return info


def forget(walkers: Walkers, fused: Fused) -> Walkers:
    """For particles that carry weights for information only: note the lag and forget them once they are exhausted.

    The lag is by how many standard deviations the weighted mean of V, or of the charges, differs from the plain one.
    Particles that keep up have weights that say nothing about where they are, and no lag however spread the weights.
    """
    log_weights = walkers.log_weights
    w = torch.softmax(log_weights, 0)

    def difference(values: Tensor) -> Tensor:
        return ((w @ values - values.mean()).abs() / values.std().clamp(min=1e-12)).detach()

    lag = torch.maximum(difference(fused.here.value), difference(fused.charges))
    due = exhausted(log_weights)
    return walkers._replace(log_weights=torch.where(due, 0.0, log_weights), lag=torch.where(due, lag, walkers.lag))
