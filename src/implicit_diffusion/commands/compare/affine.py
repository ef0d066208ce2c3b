"""A linear Gaussian chain, and the exact gradient of its objective.

With a network that is affine in every coordinate, u(x, t_k) = g_k x + c_k, the rows are

    x_{k+1} = α_k x_k + γ_k + s_k ξ_k,      α_k = a_k + b_k g_k,   γ_k = b_k c_k,

all laws are Gaussian, and with μ_k = E x_k, q_k = E x_k² (per coordinate) and the pretrained g⁰, c⁰

    μ_{k+1} = α_k μ_k + γ_k,      q_{k+1} = α_k² q_k + 2 α_k γ_k μ_k + γ_k² + s_k²
    KL(path) = Σ_k b_k²/(2 s_k²) Σ_j [(g − g⁰)² q_k + 2 (g − g⁰)(c − c⁰) μ_k + (c − c⁰)²]
    E R      = Σ_j (p μ_N − r q_N/2)      for R(x) = Σ_j (p_j x_j − r_j x_j²/2).

J = −E R + β KL is a polynomial of g and c, whose gradient autograd gives to rounding.

The pretrained network is the exact score of N(m, v) under an Ornstein–Uhlenbeck process (`GaussianDenoiser`), read off
at the rows; every row has parameters of its own, so that a gradient that misses rows points elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.ornstein_uhlenbeck import ou_marginal, ou_reverse_sde

DIMENSION, HORIZON = 8, 2.0


class AffineDenoiser(nn.Module):
    """u(x, t_k) = g_k x + c_k, with parameters `gain` and `shift` of shape (N, d); t is one of the N `times`."""

    times: Tensor

    def __init__(self, gain: Float[Tensor, "N d"], shift: Float[Tensor, "N d"], times: Float[Tensor, " N"]) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(gain), nn.Parameter(shift)
        self.register_buffer("times", times)

    def forward(self, x: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """u(x, t) with one time per sample."""
        row = nearest_row(self.times, t)
        return self.gain[row] * x + self.shift[row]


@dataclass(frozen=True, repr=False)
class QuadraticReward(Shown):
    """R(x) = Σ_j (p_j x_j − r_j x_j²/2)."""

    slope: Float[Tensor, " d"]
    curvature: Float[Tensor, " d"]

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return (self.slope * x - self.curvature * x.square() / 2).sum(1)


def nearest_row(times: Float[Tensor, " N"], t: Float[Tensor, " n"]) -> Tensor:
    """The row k of every time t, which is t_k up to rounding; shape (n,)."""
    return (t[:, None] - times).abs().argmin(1)


def affine_problem(num_steps: int) -> tuple[Chain, QuadraticReward]:
    """The chain, in double precision, and a reward: brighter coordinates, but not too far."""
    table = ou_reverse_sde(num_steps, HORIZON)
    place = torch.linspace(-1, 1, DIMENSION, dtype=torch.float64)
    score = GaussianDenoiser.ornstein_uhlenbeck(place, 0.5 + 0.2 * place.square())
    with torch.no_grad():
        at_zero = score(torch.zeros(num_steps, DIMENSION, dtype=torch.float64), table.t)
        at_one = score(torch.ones(num_steps, DIMENSION, dtype=torch.float64), table.t)
    chain = Chain(AffineDenoiser(at_one - at_zero, at_zero, table.t), table, (DIMENSION,))
    return chain, QuadraticReward(1 + 0.5 * place, 0.3 + 0.1 * place)


def clean(x: Float[Tensor, "n d"], u: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """E[x_N | x] by Tweedie's formula, of a network that predicts the score."""
    alpha, sigma = (c.to(x)[:, None] for c in ou_marginal(t))
    return (x + sigma**2 * u) / alpha


def exact_objective(chain: Chain, reward: QuadraticReward, beta: float) -> Float[Tensor, ""]:
    """J = −E R + β KL(path) by the recursion above, differentiable in the parameters of the chain's network."""
    net, ref, table = chain.denoiser, chain.reference, chain.table
    assert isinstance(net, AffineDenoiser) and isinstance(ref, AffineDenoiser)
    mean = torch.zeros_like(reward.slope)
    square = torch.full_like(mean, table.initial_std**2)
    kl = mean.new_zeros(())
    for k in range(len(table)):
        a, b, s = table.a[k], table.b[k], table.s[k]
        gain, shift = net.gain[k] - ref.gain[k], net.shift[k] - ref.shift[k]
        kl = kl + (b / s) ** 2 / 2 * (gain**2 * square + 2 * gain * shift * mean + shift**2).sum()
        alpha, gamma = a + b * net.gain[k], b * net.shift[k]
        mean, square = alpha * mean + gamma, alpha**2 * square + 2 * alpha * gamma * mean + gamma**2 + s**2
    return beta * kl - (reward.slope * mean - reward.curvature * square / 2).sum()
