"""Entropic optimal transport between weighted points, to rounding, in the log domain.

The optimal plan of OT_ε(a, b) is T = diag(u) e^{−C/ε} diag(v) with the marginals a and b. Sinkhorn's sweeps alternate

    log u = log a − log Σ_j e^{log v_j − C_ij/ε},       log v = log b − log Σ_i e^{log u_i − C_ij/ε}

and converge like λᵏ, λ the second eigenvalue of the plan: thousands of sweeps for ε of a few per cent of the costs.

*Within* one cloud u = v, and the mean of log u and its sweep converges like 2⁻ᵏ or faster at every ε, since the sweep's
derivative has its eigenvalues in [−1, 0] (Feydy et al., arXiv 1810.08278, section 3.2).

*Across* two clouds sweeps under falling ε find the neighbourhood, and Newton's method the solution (Brauer et al., *A
Sinkhorn–Newton Method for Entropic Optimal Transport*, arXiv 1710.06635). With c the present marginal in place of b,
its equation for the increment δ of log v is, after the sweep of u has made the other marginal exact,

    (diag c − Tᵀ diag(1/a) T) δ = b − c,

positive semi-definite with the constants as its kernel; conjugate gradients solve it by products with T, which cost a
fraction of a sweep. A multiple of the error is added to the diagonal: far from the solution a step is then a short one.

Solvers by sweeps alone, POT's among them, are far from the potentials after thousands of sweeps at such ε, and the
first variation needs potentials, not only the value. POT is the oracle of the tests at larger ε.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SWEEPS, PRODUCTS = 300, 200  # at most: in total, and per step of Newton's method
SOLVED = 1e-11  # misplaced mass of a marginal, of one


def within(a: Float[Tensor, " n"], cost: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], float]:
    """Log u = log v of a cloud with itself, and the mass by which a marginal is off.

    Args:
        a: weights, positive, of sum one.
        cost: C/ε, symmetric.
    """
    log_a, goal = a.log(), _goal(cost)
    log_u, error = log_a, float("inf")
    for _ in range(SWEEPS):
        swept = log_a - (log_u - cost).logsumexp(1)
        error = float(a @ ((log_u - swept).exp() - 1).abs())
        if error < goal:
            break
        log_u = (log_u + swept) / 2
    return log_u, error


def across(
    a: Float[Tensor, " n"], b: Float[Tensor, " m"], cost: Float[Tensor, "n m"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"], float]:
    """Log u and log v between two clouds, and the mass by which a marginal is off; arguments as those of `within`."""
    log_a, log_b = a.log(), b.log()
    log_v, scale, sweeps = torch.zeros_like(log_b), max(1.0, float(cost.mean())), 0
    while scale > 1:  # ε is `scale` times as large as in the end
        for _ in range(3):
            log_u, log_c = _sweep(log_a, log_v, cost / scale)
            log_v = log_v + log_b - log_c
        sweeps += 3
        log_v, scale = log_v * min(2.0, scale), scale / 2  # the potentials ε log v stay
    goal, caution, close = _goal(cost), 1.0, False
    log_u, log_c = _sweep(log_a, log_v, cost)
    error = _off(log_c, b)
    while sweeps < SWEEPS and not close:
        close = not error > goal  # one more step then: potentials are off by more than marginals where λ is near one
        if not close:
            log_v = log_v + log_b - log_c
            log_u, log_c = _sweep(log_a, log_v, cost)
            error = _off(log_c, b)
        ahead = log_v + _newton(log_a, b, log_u, log_v, log_c, cost, caution * error)
        log_u_ahead, log_c_ahead = _sweep(log_a, ahead, cost)
        sweeps += 2
        if (error_ahead := _off(log_c_ahead, b)) < error:
            log_v, log_u, log_c, error = ahead, log_u_ahead, log_c_ahead, error_ahead
            caution = max(1.0, caution / 4)
        else:
            caution *= 4
    return log_u, log_v, error


def _sweep(log_a: Tensor, log_v: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Log u that makes the marginal a exact, and the logarithm of the other marginal."""
    log_u = log_a - (log_v - cost).logsumexp(1)
    return log_u, log_v + (log_u[:, None] - cost).logsumexp(0)


def _newton(
    log_a: Tensor, b: Tensor, log_u: Tensor, log_v: Tensor, log_c: Tensor, cost: Tensor, shift: float
) -> Tensor:
    """δ: in y = √c δ the equation reads ((1 + shift) I − KᵀK) y = (b − c)/√c with K = T/√(a c), whose norm is one."""
    k = ((log_u - log_a / 2)[:, None] + (log_v - log_c / 2) - cost).exp()
    root = (log_c / 2).exp()
    kernel = root / root.norm()

    def apart(y: Tensor) -> Tensor:
        return y - kernel * (kernel @ y)

    residual = apart((b - log_c.exp()) / root)
    y, direction, square = torch.zeros_like(residual), residual, residual @ residual
    enough = square * min(0.1, max(shift, 1e-6)) ** 2
    for _ in range(PRODUCTS):
        image = apart((1 + shift) * direction - k.mT @ (k @ direction))
        step = square / (direction @ image)
        y, residual = y + step * direction, residual - step * image
        before, square = square, residual @ residual
        if not square > enough:
            break
        direction = residual + square / before * direction
    return y / root


def _off(log_c: Tensor, b: Tensor) -> float:
    return float((log_c.exp() - b).abs().sum())


def _goal(cost: Tensor) -> float:
    """`SOLVED`, or the rounding of exponents as large as these where that is larger."""
    return max(SOLVED, 4 * torch.finfo(cost.dtype).eps * float(cost.amax()))
