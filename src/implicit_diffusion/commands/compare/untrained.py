"""Two ways without training, judged by the same J.

Guidance adds to every row the gradient of the reward at the clean sample that the network predicts,

    Δ_k = w s_k²/β ∇_x R(x̂_N(x_k)),

which with w = 1 would be the optimal control if R(x̂_N(x_k))/β were log E[e^{R/β} | x_k]. (Diffusion posterior sampling:
Chung, Kim, Mccann, Klasky and Ye, arXiv 2209.14687.) It is a control like any other, so its path KL is that of a
network u_0 + Δ_k/b_k.

Best of M keeps the sample with the largest reward of M. The law of its path has the density M F(R)^{M−1} to the
pretrained one, F the distribution function of R, and for continuous rewards

    KL = log M − (M − 1)/M      in nats;

where rewards tie, it is less. (Beirami, Agarwal, Berant, D'Amour, Eisenstein, Nagpal and Suresh, arXiv 2401.01879.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.commands.compare.affine import nearest_row
from implicit_diffusion.commands.compare.problems import Clean, Problem
from implicit_diffusion.evaluation.chains import evaluate
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain


class GuidedDenoiser(nn.Module):
    """u_0 + w s²/(β b) ∇_x R(x̂_N(x)).

    Args:
        chain: whose pretrained network and table it uses.
        reward: R, differentiable.
        clean: the predicted clean sample, as in `Problem`.
        strength: w/β.
    """

    times: Tensor
    scale: Tensor

    def __init__(self, chain: Chain, reward: Callable[[Tensor], Tensor], clean: Clean, strength: float) -> None:
        super().__init__()
        assert isinstance(chain.reference, nn.Module)
        self.network, self.reward, self.clean = chain.reference, reward, clean
        table = chain.table
        self.register_buffer("times", table.t.to(chain.dtype))
        self.register_buffer("scale", (strength * table.s**2 / table.b).to(chain.dtype))

    def forward(self, x: Float[Tensor, "n *event"], t: Float[Tensor, " n"]) -> Float[Tensor, "n *event"]:
        """The guided prediction with one time per sample."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.network(x, t)
            slope = torch.autograd.grad(self.reward(self.clean(x, u, t)).sum(), x)[0]
        scale = self.scale[nearest_row(self.times, t)].view(-1, *[1] * (x.ndim - 1))
        return u.detach() + scale * slope


def guided(problem: Problem, strength: float) -> Chain:
    """The chain under guidance of strength w."""
    chain = problem.pretrained
    network = GuidedDenoiser(chain, problem.reward, problem.clean, strength / problem.beta)
    return chain.replace(denoiser=network)


def rewards_of(problem: Problem, count: int, noise: Noise, groups: int) -> Float[Tensor, "groups count"]:
    """Rewards of groups of `count` independent pretrained samples."""
    chain = problem.pretrained.pretrained()
    return evaluate(chain, problem.reward, noise, starts=groups * count).reward.reshape(groups, count)


def best_of_kl(count: int) -> float:
    """KL of best of M to the pretrained law, in nats, for continuous rewards."""
    return math.log(count) - (count - 1) / count
