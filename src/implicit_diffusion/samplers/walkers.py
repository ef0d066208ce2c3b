"""Particles that carry weights while the potential under them moves.

For a path of potentials V_0, V_1, … fixed in advance, a kernel's step under V_k and the increment

    A_{k+1} = A_k + debt_k − repay_{k+1}        (see `Kernel`)

keep  E_{π_k} φ = E[φ(X_k) e^{A_k}]/E[e^{A_k}]  and  log Z_k = log Z_0 + log E e^{A_k}  exact at any step size
(Jarzynski, cond-mat/9610209; Neal, physics/9803008). When fewer than half of the particles are effective they are drawn
anew by their weights, systematically, and log E e^A is carried on as a number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import Kernel
from implicit_diffusion.samplers.resampling import systematic
from implicit_diffusion.showing import of_tuple


class Walkers(NamedTuple):
    """Particles between two iterations, with what their next increment of weights needs.

    Args:
        x: positions, with shape (n, *event).
        momentum: as `x`; None for kernels without.
        log_weights: A, with shape (n,).
        log_z: log Z_θ less the log mean e^A of the present weights: carried over the resamplings.
        previous: where the last step came from, as `x`.
        debt: its part of the increment, with shape (n,), in the widest dtype.
        h: its step size.
        lag: by how many deviations weighted and unweighted means differed when the weights were last given up.
    """

    x: Tensor
    momentum: Tensor | None
    log_weights: Tensor
    log_z: Tensor
    previous: Tensor
    debt: Tensor
    h: Tensor
    lag: Tensor

    def __repr__(self) -> str:
        return of_tuple(self)


def close(kernel: Kernel, walkers: Walkers, here: Energy) -> Walkers:
    """The weights under the θ of `here`: A ← A + debt − repay."""
    repaid = kernel.repay(walkers.previous, walkers.x, here, walkers.h)
    closed = exact(walkers.log_weights) + exact(walkers.debt) - exact(repaid)
    return walkers._replace(log_weights=closed.to(walkers.log_weights.dtype))


def log_mean_exp(log_weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Log (1/n) Σ_i e^{A_i}."""
    return (log_weights - log_weights.amax()).exp().mean().log() + log_weights.amax()


def resample(walkers: Walkers, here: Energy, uniform: Float[Tensor, ""]) -> tuple[Walkers, Energy]:
    """Where fewer than half of the particles are effective, draw them anew by their weights and carry log Z on.

    Free of branches, so that it compiles and no device is waited for.
    """
    log_weights, n = walkers.log_weights, len(walkers.x)
    due = exhausted(log_weights)
    chosen = torch.where(due, systematic(log_weights, uniform), torch.arange(n, device=log_weights.device))
    taken = walkers._replace(
        x=walkers.x[chosen],
        momentum=None if walkers.momentum is None else walkers.momentum[chosen],
        log_weights=torch.where(due, 0.0, log_weights),
        log_z=walkers.log_z + torch.where(due, log_mean_exp(log_weights), 0.0),
    )
    return taken, Energy(here.value[chosen], here.grad[chosen])


def exhausted(log_weights: Float[Tensor, " n"]) -> Tensor:
    """Whether the effective sample size is below n/2."""
    return Particles(log_weights, log_weights).ess < len(log_weights) / 2
