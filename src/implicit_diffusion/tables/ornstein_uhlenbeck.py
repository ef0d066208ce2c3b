"""Chains derived by hand: the reversed Ornstein–Uhlenbeck process.

The forward process

    dX = −X dt + √2 dB        has        X_t = α_t X_0 + σ_t ε,    α_t = e^{−t},    σ_t² = 1 − e^{−2t},

with marginals p_t that tend to N(0, I). Run backwards from a horizon T, Y_τ = X_{T−τ} obeys either of

    dY = (Y + 2 ∇log p_{T−τ}(Y)) dτ + √2 dB        reverse SDE (Song et al., arXiv 2011.13456, eq. 6)
    dY = (Y +   ∇log p_{T−τ}(Y)) dτ                probability-flow ODE (arXiv 2011.13456, eq. 13)

Both have the marginals of X. With N steps of length h = T/N at the times t_k = T − kh (from T down to h: a
step uses the score at its noisy end, so the score at 0 is never evaluated) the Euler scheme is the affine
recursion

    x_{k+1} = (1 + h) x_k + g h S(x_k, t_k) + s ξ_k,    g = 2, s = √(2h) (SDE)  or  g = 1, s = 0 (ODE).

The network may predict the score S itself, the noise ε̂ = E[ε | x_t] or the data x̂ = E[X_0 | x_t]. By
Tweedie's formula S = −ε̂/σ_t = (α_t x̂ − x)/σ_t², that is S = c_x x + c_u u with

    prediction      c_x          c_u
    score           0            1
    epsilon         0            −1/σ_t
    sample          −1/σ_t²      α_t/σ_t²

and therefore a_k = 1 + h + g h c_x(t_k), b_k = g h c_u(t_k). The chain starts at N(0, I), which differs from
p_T by O(e^{−T}); the discretisation error of the law is O(h).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_integer, check_number, shown
from implicit_diffusion.tables.table import ChainTable


def ou_marginal(t: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """α_t = e^{−t} and σ_t = √(1 − e^{−2t}) of X_t = α_t X_0 + σ_t ε, with the shape and dtype of `t`."""
    return torch.exp(-t), torch.sqrt(-torch.expm1(-2 * t))


def ou_reverse_sde(num_steps: int, horizon: float, prediction: str = "score") -> ChainTable:
    """Euler–Maruyama for dY = (Y + 2 score) dτ + √2 dB from time `horizon` down to 0.

    Args:
        num_steps: N ≥ 1.
        horizon: T > 0, in the time of dX = −X dt + √2 dB.
        prediction: what the network predicts, "score", "epsilon" or "sample".

    Returns:
        N rows with t_k = T − kh, h_k = h = T/N, s_k = √(2h); `initial_std` is 1.

    Raises:
        InvalidInputError: an argument is out of its range.
    """
    return _euler(num_steps, horizon, prediction, g=2.0, noise=math.sqrt(2.0), name="OU reverse SDE")


def ou_probability_flow(num_steps: int, horizon: float, prediction: str = "score") -> ChainTable:
    """Euler for the ODE dY = (Y + score) dτ from time `horizon` down to 0: the same marginals without noise.

    Arguments, times and errors are those of `ou_reverse_sde`; s_k = 0.
    """
    return _euler(num_steps, horizon, prediction, g=1.0, noise=0.0, name="OU probability flow")


def _euler(num_steps: int, horizon: float, prediction: str, g: float, noise: float, name: str) -> ChainTable:
    num_steps, horizon = check_integer("num_steps", num_steps), check_number("horizon", horizon, 0)
    if not isinstance(prediction, str) or prediction not in ("score", "epsilon", "sample"):
        raise InvalidInputError(f"prediction must be 'score', 'epsilon' or 'sample', got {shown(prediction)}.")
    h = horizon / num_steps
    # N − k, not T − kh: the last time is h to the last bit.
    t = h * torch.arange(num_steps, 0, -1, dtype=torch.float64)
    c_x, c_u = _score_coefficients(t, prediction)
    ones = torch.ones_like(t)
    return ChainTable(
        a=1 + h + g * h * c_x,
        b=g * h * c_u,
        s=noise * math.sqrt(h) * ones,
        m=ones,
        t=t,
        h=h * ones,
        initial_std=1.0,
        name=f"{name}, {num_steps} steps to T = {horizon:g}, {prediction}",
    )


def _score_coefficients(t: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(c_x, c_u) of score = c_x x + c_u u at the times `t`."""
    alpha, sigma = ou_marginal(t)
    zero = torch.zeros_like(t)
    if prediction == "score":
        return zero, torch.ones_like(t)
    if prediction == "epsilon":
        return zero, -1 / sigma
    return -1 / sigma**2, alpha / sigma**2
