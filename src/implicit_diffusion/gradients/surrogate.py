"""The surrogate: the adjoint on a differentiable R̂, and the score function on what R̂ leaves of the reward.

For any function R̂ and any number α that do not depend on the batch,

    ∇ E R = ∇ E[α R̂]  +  ∇ E[R − α R̂]
            adjoint       score function

so that Γ is unbiased for *every* fixed R̂: a good one moves the variance from the score function, which knows of a
reward no more than its value, to the adjoint, which follows a slope. Written as one scalar per row, with A the rest
−(R − α R̂) less its mean over the other samples, ρ_k the ratio of the present density of x_{k+1} to the one that it was
drawn from, and the running costs c_k differentiated as they are,

    λ_N = −α ∇R̂(x_N)/B,     S_k = ⟨b_k λ_{k+1}, u_θ(m_k x_k, t_k)⟩ + (1/B) Σ_i c_k(x_k,i, θ)
    T_k = (1/B) Σ_i ρ_k,i A_i
    Γ += ∇_θ (S_k + T_k),     λ_k = a_k λ_{k+1} + ∇_{x_k} S_k

T_k has no part in λ: the score function holds the states fixed. One forward of the network serves both; its backward is
run once for ∇_{x_k} T_k, which is taken out again, and once for everything.

R̂ is a regression on pairs (x_N, R) of *earlier* trajectories (`gradients.surrogate_regression`): a batch turns round
under the R̂ of those before it, its λ_N and A are fixed there, and only then is it learned. A surrogate fitted to its own
batch would explain that batch's rewards by heart, and A would be missing from Γ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_integer, check_number, check_tensor, check_type
from implicit_diffusion.gradients import loss_scaling
from implicit_diffusion.gradients.estimator import Carry, Pulled, RowEstimator, RowStates
from implicit_diffusion.gradients.footprint import Footprint, bytes_of, row_activations, saved_per_sample
from implicit_diffusion.gradients.surrogate_network import RewardNetwork, check_network, predicted
from implicit_diffusion.gradients.surrogate_regression import Regression
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.objectives.variation import Density
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain

CHUNK = 64  # pairs that are predicted together, then learned, where many come at once


class Surrogate(RowEstimator):
    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        pairs: int = 4096,
        steps: int = 10,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.pairs, self.steps = pairs, steps
        self.learning_rate, self.noise = learning_rate, Noise(seed)
        self.regression: Regression | None = None
        self.use = None

    def _regression(self, x: Tensor, condition) -> Regression:
        if self.regression is None:
            network = self.network
            if network is None:
                network = RewardNetwork(x.shape[1:], self.noise.stream(0)).to(x.device, x.dtype)
            self.regression = Regression(
                network, self.noise.stream(1), pairs=self.pairs, steps=self.steps, learning_rate=self.learning_rate
            )
        return self.regression

    def learn(self, x, rewards, condition=None) -> None:
        regression = self._regression(x, condition)
        for first in range(0, len(x), CHUNK):
            part = slice(first, first + CHUNK)
            given = None if condition is None else {name: entry[part] for name, entry in condition.items()}
            regression.learn(x[part], rewards[part], given)

    def turn(self, objective, end):
        values, own = {}, end.x.new_zeros(len(end.x))
        for weight, term in objective.terminal:
            variation = term.shared_variation(end, Density(end.x.new_zeros(len(end.x))))
            values[term.name] = variation.value
            own = own - weight * variation.function
        rewards, whole = processes.gathered(own), end.whole()
        regression = self._regression(whole.x, whole.condition)
        batch = len(rewards)
        with torch.enable_grad():
            x = whole.x.detach().requires_grad_()
            guess = regression(x, whole.condition)
            (slope,) = torch.autograd.grad(guess.sum(), x)
        share = regression.share
        rest = share * guess.detach() - rewards
        advantage = (rest - rest.mean()) / (batch - 1)
        if rewards.isfinite().all():
            regression.learn(whole.x.detach(), rewards, whole.condition)
        carry = {"adjoint": processes.share(-share / batch * slope), "advantage": processes.share(advantage), "after": end.x}
        return carry, values

    def pull(self, chain, objective, at, carry):
        x, xi = at.x.detach().requires_grad_(), at.innovation(chain)
        trains = any(row not in chain.pretrained_rows for row in at.rows)
        costs = {}
        with torch.enable_grad():
            transition = chain.transition(x, at.rows, reference=bool(objective.running), condition=at.condition)
            path = (transition.b * carry["adjoint"] * transition.u).sum()
            for weight, term in objective.running:
                cost = term.cost(transition).mean(1)
                path = path + weight * cost.sum() / processes.count()
                costs[term.name] = cost.detach()
            if trains:
                gain = torch.where(transition.trained, 1 / transition.s, 0)
                moved = gain * (transition.mean - carry["after"]) + (xi if xi is not None else 0)
                log_ratio = (moved * xi).flatten(2).sum(-1) - moved.square().flatten(2).sum(-1) / 2
                score = (log_ratio.exp() * carry["advantage"]).sum()
                (g,) = torch.autograd.grad(score, x, retain_graph=True)
            else:
                score, g = 0, 0
        (path + score).backward()
        adjoint = transition.a * carry["adjoint"] + x.grad - g
        return Pulled({**carry, "adjoint": adjoint, "after": at.x}, costs, transition.evaluations)

    def memory(self, chain, objective, noise):
        raise NotImplementedError
