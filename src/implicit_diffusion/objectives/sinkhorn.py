"""Sinkhorn divergence to data (Feydy et al., arXiv 1810.08278), with the cost ‖x − y‖².

    F(p) = OT_ε(p, q) − ½ OT_ε(p, p) − ½ OT_ε(q, q)

With the optimal plan T = diag(u) e^{−C/ε} diag(v), the potential of a marginal is ε log u up to its log-weights, which
cancel between the terms. Hence, for the debiased divergence with its self-terms, whose v is u,

    F′(p)[x_i] = ε (log u_pq − log u_pp)_i

Its gradient in positions is that of the costs under fixed plans (the envelope theorem). Plans are solved to rounding
(`transport`) in each call, from the same initial guess, so that results depend on the arguments alone.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_number
from implicit_diffusion.objectives import transport
from implicit_diffusion.objectives.attributes import check_name
from implicit_diffusion.objectives.base import TerminalObjective
from implicit_diffusion.objectives.data import checked, fitting
from implicit_diffusion.objectives.variation import Density, FirstVariation
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import squared_distances, widest

SILENT, TOLERATED = 1e-7, 1e-3  # misplaced mass of a marginal, of one: above them a warning, or an error


class Sinkhorn(TerminalObjective):
    """Sinkhorn divergence to data. Serves chains as well.

    Args:
        data: draws from the reference, with shape (m, *event).
        epsilon: ε > 0, in units of squared distance. The smaller it is compared with the typical one, the
            longer the solver runs; below a thousandth of it plans are nearly unregularised, and the solver may fail.
        name: under which metrics report it.

    Raises:
        InvalidInputError: no data, data that are NaN or infinite, or ε ≤ 0; in a call also a plan whose marginals are
            off by more than 0.1 % (by less it warns).
    """

    def __init__(self, data: Float[Tensor, "m *event"], epsilon: float, name: str = "sinkhorn") -> None:
        self.data, self.epsilon, self.name = checked(data), check_number("epsilon", epsilon, 0.0), check_name(name)
        m, dtype = len(self.data), widest(self.data.device)
        self._tiny = torch.finfo(dtype).tiny
        self._uniform = torch.full((m,), 1 / m, dtype=dtype, device=self.data.device)
        self._within = self.epsilon * (
            self._uniform @ self._self(self._uniform, squared_distances(self.data, self.data))
        )
        if not self._within.isfinite():
            raise InvalidInputError("data lie so far apart that their squared distances are infinite; use other units")

    def value(self, particles: Particles) -> Float[Tensor, ""]:
        value, cost = self._solve(particles)[1:]
        return (value + cost - cost.detach()).to(particles.x.dtype)

    def first_variation(self, particles: Particles, density: Density | None = None) -> FirstVariation:
        function, value, _ = self._solve(particles)
        return FirstVariation(function.to(particles.x.dtype), value=value.to(particles.x.dtype))

    def _solve(self, particles: Particles) -> tuple[Tensor, Tensor, Tensor]:
        """F′ and F, detached, and the cost under fixed plans, differentiable in positions."""
        particles = fitting("Sinkhorn", self.data, particles)
        x, w = particles.x, particles.weights.detach().to(self._uniform).clamp(min=self._tiny)  # they may underflow
        w = w / w.sum()  # to more digits than single precision has: a plan has one mass
        cost, self_cost, eps = squared_distances(x, self.data), squared_distances(x, x), self.epsilon
        with torch.no_grad():
            log_u, log_v, error = transport.across(w, self._uniform, cost / eps)
            self._check(error, cost)
            self_u = self._self(w, self_cost)
            function = eps * (log_u - self_u)
            value = w @ function + eps * (self._uniform @ log_v) - self._within
            plan = (log_u[:, None] + log_v - cost / eps).exp()
            self_plan = (self_u[:, None] + self_u - self_cost / eps).exp()
        return function, value, (plan * cost).sum() - (self_plan * self_cost).sum() / 2

    def _self(self, w: Tensor, cost: Tensor) -> Tensor:
        with torch.no_grad():
            log_u, error = transport.within(w, cost / self.epsilon)
        self._check(error, cost)
        return log_u

    def _check(self, error: float, cost: Tensor) -> None:
        if not error > SILENT:  # NaN is that of the particles, which loops find
            return
        advice = f"the mean squared distance is {cost.detach().mean().item():.3g}: use a larger epsilon"
        if error > TOLERATED:
            raise InvalidInputError(
                f"Sinkhorn did not converge in {transport.SWEEPS} sweeps with epsilon {self.epsilon:g}; {advice}"
            )
        warnings.warn(
            f"Sinkhorn with epsilon {self.epsilon:g} is not solved to rounding: marginals are off by up to "
            f"{TOLERATED:.1%} of the mass; use a larger epsilon",
            stacklevel=2,
        )
