"""The Gaussian location problem in closed form, for any number of particles and any steps.

For V = (x − θ)²/2 and maximum likelihood of data with mean a, ∇ℓ = θ − a and Γ = x̄ − a. The mean x̄ of n particles and
θ are a linear recursion by themselves. With u = x̄ − a, v = θ − a and ξ standard normal,

    u⁺ = (1 − h) u + h v + √(2h/n) ξ,        v⁺ = v − η u.

**Second moments.** S = E (u, v)(u, v)ᵀ obeys S⁺ = M S Mᵀ + diag(2h/n, 0), with M the matrix of the recursion. So
E ∇ℓ(θ_k)² is known at every k, for steps that depend on k as well.

**Floor.** At constant steps S⁺ = S gives E uv = η E u²/2, and from the other two equations

    E ∇ℓ² = (η/h)(1/n) · (1 − h/2 + ηh/2) · 2/(2 − h − 2η + 3ηh/2 − η²h/2),

which is (η/h)/n to first order. There is no bias of order h: ULA has the right mean here.

**Lag.** Without noise the slow solution is (u, v) ∝ zᵏ with z² − (2 − h) z + 1 − h + ηh = 0. From v⁺ = v − ηu the
particles are behind by u − v = ((1 − z)/η − 1) v, and with r = η/h, 1 − z = h (1 − √(1 − 4r))/2:

    lag = (x̄ − θ)/(θ − a) = C(r) − 1 = r + 2r² + 5r³ + …,        C(r) = (1 − √(1 − 4r))/(2r),

the generating function of the Catalan numbers: a function of η/h alone. At r > 1/4 the mean oscillates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def recursion(h: float, lr: float) -> Float[Tensor, "2 2"]:
    """M: (u, v) ↦ E(u⁺, v⁺)."""
    return torch.tensor([[1 - h, h], [-lr, 1.0]], dtype=torch.float64)


def squared_gradients(
    steps: Sequence[tuple[float, float]], particles: int, start: float
) -> Float[Tensor, " iterations"]:
    """E ∇ℓ(θ_k)² for k = 0, 1, …, from X_0 ~ N(a, 1) and θ_0 = a + start.

    Args:
        steps: (h_k, η_k) of every iteration.
        particles: n.
        start: θ_0 − a.
    """
    moments = torch.tensor([[1 / particles, 0.0], [0.0, start**2]], dtype=torch.float64)
    squares = []
    for h, lr in steps:
        squares.append(moments[1, 1].item())
        M = recursion(h, lr)
        moments = M @ moments @ M.T
        moments[0, 0] += 2 * h / particles
    return torch.tensor(squares, dtype=torch.float64)


def floor(h: float, lr: float, particles: int) -> float:
    """E ∇ℓ² at constant steps."""
    denominator = 2 - h - 2 * lr + 1.5 * lr * h - lr**2 * h / 2
    return lr / h / particles * (1 - h / 2 + lr * h / 2) * 2 / denominator


def lag(ratio: float) -> float:
    """(x̄ − θ)/(θ − a) of the slow solution, for 0 < η/h ≤ 1/4."""
    return (1 - math.sqrt(1 - 4 * ratio)) / (2 * ratio) - 1


def lag_over(h: float, lr: float, first: int, last: int) -> float:
    """Σ (x̄ − θ)(θ − a)/Σ (θ − a)² over the iterations first ≤ k < last, without noise, from x̄_0 = θ_0."""
    M, state, states = recursion(h, lr), torch.ones(2, dtype=torch.float64), []
    for _ in range(last):
        states.append(state)
        state = M @ state
    u, v = torch.stack(states[first:]).unbind(1)
    return (((u - v) * v).sum() / v.square().sum()).item()
