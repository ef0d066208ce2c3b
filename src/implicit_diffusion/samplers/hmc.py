"""Hamiltonian Monte Carlo (Duane et al., 1987; Neal, *MCMC Using Hamiltonian Dynamics*, arXiv 1206.1901).

A fresh momentum p ~ N(0, I), L leapfrog steps of size h on H = V(x) + ‖p‖²/2, and a Metropolis test on the change of H.
"""

from __future__ import annotations

from implicit_diffusion.errors import check_integer
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import Info, State, Step, StepSize, inner_product
from implicit_diffusion.samplers.metropolis import MetropolisKernel, accept_or_reject


class HMC(MetropolisKernel):
    """Hamiltonian Monte Carlo with unit mass. It leaves π_θ invariant exactly.

        >>> import torch
        >>> from implicit_diffusion import HMC, GaussianMixture, Noise
        >>> potential, generator = GaussianMixture(torch.zeros(1, 2)), Noise(0).generator()  # N(0, I)
        >>> kernel = HMC(0.5, leapfrogs=3)
        >>> state = kernel.start(torch.zeros(10_000, 2), generator)
        >>> for k in range(20):
        ...     state, info = kernel.move(kernel.prepare(potential, state, generator, k))
        >>> print(f"{state.x.var():.1f}", bool(info.acceptance.mean() > 0.9))
        1.0 True

    Args:
        step_size: h > 0 of the leapfrog, or a function k ↦ h_k of the iteration k = 0, 1, … (`power_law`).
        leapfrogs: L ≥ 1, the number of leapfrog steps in one step of the kernel.

    Raises:
        InvalidInputError: a step size that is not positive and finite, or no leapfrog.
    """

    target_acceptance = 0.8

    def __init__(self, step_size: StepSize, leapfrogs: int = 5) -> None:
        super().__init__(step_size)
        self.leapfrogs = check_integer("leapfrogs", leapfrogs)
        self.evaluations_per_step = 1 + self.leapfrogs

    def reach(self, h: float) -> float:
        """h: a leapfrog moves a position by about its step size."""
        return h

    def move(self, step: Step) -> tuple[State, Info]:
        """L leapfrogs from a fresh momentum, then accept or reject."""
        p, uniform = step.draws
        y, there, h = step.x, step.here, step.h
        before = exact(there.value) + inner_product(p, p) / 2
        for _ in range(self.leapfrogs):
            p = p - h / 2 * there.grad
            y = y + h * p
            there = step.energy(y)
            p = p - h / 2 * there.grad
        after = exact(there.value) + inner_product(p, p) / 2
        return accept_or_reject(step, y, there.value, before - after, uniform)
