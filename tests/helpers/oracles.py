"""Closed forms shared by the tests: linear Gaussian chains, their optimum by Riccati recursion, their bound.

Everything is diagonal: u(x, t) = gain_k · x + shift_k per coordinate, with t = k the row itself, and the reward is
R(x) = Σ_j (p_j x_j − q_j x_j²/2). Then every law is Gaussian and every expectation a polynomial in its moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.table import ChainTable


def table(num_steps: int = 6, *, noise: bool = True, scaled: bool = False, seed: int = 0) -> ChainTable:
    """A table of rows without any symmetry that could hide a mistake; t_k = k."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(5, num_steps, generator=g, dtype=torch.float64)
    return ChainTable(
        a=0.8 + 0.3 * u[0],
        b=0.2 + 0.3 * u[1],
        s=(0.3 + 0.3 * u[2]) * noise,
        m=0.7 + 0.6 * u[3] if scaled else torch.ones(num_steps, dtype=torch.float64),
        t=torch.arange(num_steps, dtype=torch.float64),
        h=0.1 + 0.1 * u[4],
        initial_std=1.3,
        name="test table",
    )


class AffineDenoiser(nn.Module):
    """u(x, t) = gain[t] · x + shift[t], with gain and shift of shape (N, *event)."""

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(gain.clone()), nn.Parameter(shift.clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain[t.long()] * x + self.shift[t.long()]


@dataclass
class QuadraticReward:
    """R(x) = Σ_j (p_j x_j − q_j x_j²/2)."""

    p: Tensor
    q: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (self.p * x - self.q * x**2 / 2).flatten(1).sum(1)


def affine_chain(
    num_steps: int = 6, dim: int = 2, *, noise: bool = True, pretrained_rows=(), seed: int = 0
) -> tuple[Chain, QuadraticReward]:
    """A linear Gaussian chain with random pretrained gains, and a concave quadratic reward."""
    g = torch.Generator().manual_seed(seed + 1)
    gain, shift = torch.randn(2, num_steps, dim, generator=g, dtype=torch.float64) * 0.4
    chain = Chain(
        AffineDenoiser(gain, shift),
        table(num_steps, noise=noise, scaled=True, seed=seed),
        (dim,),
        pretrained_rows=pretrained_rows,
    )
    p = 0.5 + torch.rand(dim, generator=g, dtype=torch.float64)
    return chain, QuadraticReward(p, p / 2)


def exact_terms(chain: Chain, reward: QuadraticReward, mean0: Tensor | None = None, square0: Tensor | None = None):
    """E R and the path KL of an affine chain by moment recursion; differentiable in gain and shift.

    `mean0` and `square0` are E x_0 and E x_0² (of the law N(0, σ_0²) by default), per coordinate.
    Returns (E R, path KL, drift penalty); the KL is 0/0 on rows without noise.
    """
    net, ref, tab = chain.denoiser, chain.reference, chain.table
    mean = torch.zeros_like(reward.p) if mean0 is None else mean0
    square = torch.full_like(reward.p, tab.initial_std**2) if square0 is None else square0
    kl = drift = torch.zeros((), dtype=torch.float64)
    for k in range(len(tab)):
        a, b, s, m = tab.a[k], tab.b[k], tab.s[k], tab.m[k]
        acting = ref if k in chain.pretrained_rows else net
        dg, ds = m * (acting.gain[k] - ref.gain[k]), acting.shift[k] - ref.shift[k]
        distance = b**2 * (dg**2 * square + 2 * dg * ds * mean + ds**2).sum()
        drift = drift + distance / (2 * tab.h[k])
        if k not in chain.pretrained_rows:
            kl = kl + distance / (2 * s**2)
        alpha, gamma = a + b * m * acting.gain[k], b * acting.shift[k]
        square = alpha**2 * square + 2 * alpha * gamma * mean + gamma**2 + s**2
        mean = alpha * mean + gamma
    return (reward.p * mean - reward.q * square / 2).sum(), kl, drift


def riccati(chain: Chain, reward: QuadraticReward, beta: float) -> tuple[float, Tensor, Tensor]:
    """The attainable optimum of −E R + β·path KL over all controls of the trained rows, and the gains that attain it.

    V_k(x) = P x²/2 + r x + c is the least cost to go. With μ = α x + γ the pretrained mean, v the control's shift and
    κ = β/s², min_v { P(μ+v)²/2 + r(μ+v) + κv²/2 } is attained at v = −(Pμ + r)/(P + κ).
    """
    ref, tab = chain.reference, chain.table
    big_p, r, c = reward.q.clone(), -reward.p.clone(), torch.zeros_like(reward.p)
    gain, shift = ref.gain.detach().clone(), ref.shift.detach().clone()
    for k in reversed(range(len(tab))):
        a, b, s, m = tab.a[k], tab.b[k], tab.s[k], tab.m[k]
        alpha, gamma = a + b * m * ref.gain[k].detach(), b * ref.shift[k].detach()
        c = c + big_p * s**2 / 2
        if k not in chain.pretrained_rows:
            kappa = beta / s**2
            gain[k] += -big_p * alpha / (big_p + kappa) / (b * m)
            shift[k] += -(big_p * gamma + r) / (big_p + kappa) / b
            shrink = kappa / (kappa + big_p)
            c = c - r**2 / (2 * (kappa + big_p))
            big_p, r = shrink * big_p, shrink * r
        c = c + big_p * gamma**2 / 2 + r * gamma
        big_p, r = big_p * alpha**2, big_p * alpha * gamma + r * alpha
    return (c + big_p * tab.initial_std**2 / 2).sum().item(), gain, shift


def tilted_bound(chain: Chain, reward: QuadraticReward, beta: float) -> tuple[float, float]:
    """J* of the pretrained affine chain given x_0, and unconditionally, in closed form.

    x_N | x_0 ~ N(g x_0 + h, v); log E e^{(p x − q x²/2)/β} of a N(μ, v) variable is
    −log(1 + qv/β)/2 + (pμ/β − qμ²/(2β) + p²v/(2β²)) / (1 + qv/β).
    """
    ref, tab = chain.reference, chain.table
    g, h, v = torch.ones_like(reward.p), torch.zeros_like(reward.p), torch.zeros_like(reward.p)
    for k in range(len(tab)):
        alpha = tab.a[k] + tab.b[k] * tab.m[k] * ref.gain[k].detach()
        g, h, v = alpha * g, alpha * h + tab.b[k] * ref.shift[k].detach(), alpha**2 * v + tab.s[k] ** 2

    def log_mean(mean: Tensor, square: Tensor, variance: Tensor) -> Tensor:
        p, q = reward.p / beta, reward.q / beta
        stretch = 1 + q * variance
        return -stretch.log() / 2 + (p * mean - q * square / 2 + p**2 * variance / 2) / stretch

    start = tab.initial_std**2
    conditional = log_mean(h, h**2 + g**2 * start, v).sum()
    unconditional = log_mean(h, h**2, v + g**2 * start).sum()
    return -beta * conditional.item(), -beta * unconditional.item()
