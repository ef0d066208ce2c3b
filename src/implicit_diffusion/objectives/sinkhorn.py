"""Sinkhorn divergence to data (Feydy et al., arXiv 1810.08278), with the cost ‖x − y‖² and POT's solver.

    F(p) = OT_ε(p, q) − ½ OT_ε(p, p) − ½ OT_ε(q, q)

With the optimal plan T = diag(u) e^{−C/ε} diag(v), the potential of a marginal is ε log u up to its log-weights, which
cancel between the terms. Hence, for the debiased divergence with its self-terms,

    F′(p)[x_i] = ε (log u_pq − ½ (log u_pp + log v_pp))_i

Its gradient in positions is that of the costs under fixed plans (the envelope theorem).
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives.base import TerminalObjective
from implicit_diffusion.objectives.data import check_fits, checked
from implicit_diffusion.objectives.mmd import squared_distances
from implicit_diffusion.particles import Particles


class Sinkhorn(TerminalObjective):
    """Sinkhorn divergence to data. Serves chains as well.

    Args:
        data: draws from the reference, with shape (m, *event).
        epsilon: ε > 0, in units of squared distance; below a hundredth of the typical one the solver needs many sweeps.
        name: under which metrics report it.

    Raises:
        InvalidInputError: no data, data that are NaN or infinite, or ε ≤ 0.
    """

    def __init__(self, data: Float[Tensor, "m *event"], epsilon: float, name: str = "sinkhorn") -> None:
        checked(data)
        if not 0 < epsilon < math.inf:
            raise InvalidInputError(f"epsilon must be positive and finite, got {epsilon}")
        self.data, self.epsilon, self.name = data, epsilon, name
        self._uniform = torch.full((len(data),), 1 / len(data), dtype=torch.float64, device=data.device)
        with torch.no_grad():
            log_u, log_v = self._solve(self._uniform, self._uniform, squared_distances(data, data))
        self._within = epsilon * (self._uniform * (log_u + log_v)).sum() / 2

    def value(self, particles: Particles) -> Float[Tensor, ""]:
        value, cost = self._parts(particles)[1:]
        return (value + cost - cost.detach()).to(particles.x.dtype)

    def first_variation(self, particles: Particles) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
        variation, value, _ = self._parts(particles)
        return variation.to(particles.x.dtype), value.to(particles.x.dtype)

    def _parts(self, particles: Particles) -> tuple[Tensor, Tensor, Tensor]:
        """F′ and F, detached, and the cost under fixed plans, differentiable in positions."""
        x, w = particles.x, particles.weights.detach().double().clamp(min=1e-300)  # they may underflow
        w = w / w.sum()  # to more digits than single precision has: POT compares marginals
        check_fits("Sinkhorn", self.data, x)
        across, within = squared_distances(x, self.data), squared_distances(x, x)
        log_u, log_v = self._solve(w, self._uniform, across)
        self_u, self_v = self._solve(w, w, within)
        eps = self.epsilon
        variation = eps * (log_u - (self_u + self_v) / 2)
        value = (w * variation).sum() + eps * (self._uniform * log_v).sum() - self._within
        plan = (log_u[:, None] + log_v - across.detach().double() / eps).exp()
        self_plan = (self_u[:, None] + self_v - within.detach().double() / eps).exp()
        return variation, value, (plan * across).sum() - (self_plan * within).sum() / 2

    def _solve(self, a: Tensor, b: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Log u, log v, in double precision: the marginals then hold to 1e−9."""
        import ot

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Sinkhorn did not converge")
            try:
                log = ot.bregman.sinkhorn_log(a, b, cost.detach().double(), self.epsilon, numItermax=20000, log=True)[1]
            except UserWarning as warning:
                raise InvalidInputError(
                    f"Sinkhorn did not converge in 20000 sweeps with epsilon {self.epsilon:g}; the mean squared "
                    f"distance is {cost.mean().item():.3g}: take a larger epsilon"
                ) from warning
        return log["log_u"], log["log_v"]
