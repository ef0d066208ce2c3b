r"""Pools: G outcomes that share M samples of one law, their pooled posterior, and weigh them each in its own way.

The *pooled posterior* of the outcomes y_1..y_G is the geometric mean of their posteriors (Iollo, Heinkelé, Alliez and
Forbes, *Bayesian Experimental Design via Contrastive Diffusions*, arXiv 2410.11826):

    q(z′) ∝ p(z′) Π_i p(y_i|z′, ξ)^{1/G},            w_ij ∝ p(y_i|z′_j, ξ) / Π_k p(y_k|z′_j, ξ)^{1/G},  Σ_j w_ij = 1,
    ∇EIG = E mean_i [∇_ξ log p(y_i|z_i, ξ) − Σ_j w_ij ∇_ξ log p(y_i|z′_j, ξ)]  + O(1/M).

A pool is a grid of G·M pairs (z′_j, z_i, ε_i). Let V_ij be their potentials (`experiment`), then

    −log q(z′_j) = mean_i V_ij + const,    w_ij = softmax_j(mean_k V_kj − V_ij),    ∇EIG ≈ mean_i Σ_j w_ij ∇_ξ V_ij:

what moves z′_j is the mean of the forces of its G pairs, and the charge of a pair is its weight. A pool of one outcome
has equal weights and the posterior itself, and with one sample it is a pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_integer
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class Pool(Shown):
    """How many outcomes share how many samples. Particles of a loop are pools one after the other, outcome by outcome.

    Args:
        outcomes: G.
        samples: M.

    Raises:
        InvalidInputError: counts below one.
    """

    outcomes: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcomes", check_integer("outcomes", self.outcomes))
        object.__setattr__(self, "samples", check_integer("samples", self.samples))

    @property
    def size(self) -> int:
        """G·M, the pairs of one pool."""
        return self.outcomes * self.samples

    def grid(self, numbers: Float[Tensor, "*shape"], dim: int = 0) -> Float[Tensor, "*grid"]:
        """Numbers of particles with their dimension as three: (pools, outcomes, samples).

        Raises:
            InvalidInputError: particles that are not whole pools.
        """
        if numbers.shape[dim] % self.size:
            raise InvalidInputError(
                f"particles must be pools of {self.outcomes} outcomes × {self.samples} samples, a multiple of "
                f"{self.size} in each process, got {numbers.shape[dim]}"
            )
        return numbers.unflatten(dim, (-1, self.outcomes, self.samples))

    def of_samples(self, numbers: Float[Tensor, "*shape"], dim: int = 0) -> Float[Tensor, "*shape"]:
        """The first outcome's numbers for all: what belongs to a sample alone."""
        if self.outcomes == 1:
            return numbers
        grid = self.grid(numbers, dim)
        return grid.narrow(dim + 1, 0, 1).expand(grid.shape).flatten(dim, dim + 2)

    def of_outcomes(self, numbers: Float[Tensor, "*shape"], dim: int = 0) -> Float[Tensor, "*shape"]:
        """The first sample's numbers for all: what belongs to an outcome alone."""
        if self.samples == 1:
            return numbers
        grid = self.grid(numbers, dim)
        return grid.narrow(dim + 2, 0, 1).expand(grid.shape).flatten(dim, dim + 2)

    def pooled(self, pairs: Energy) -> Energy:
        """Of the pairs' V and ∇V the means over outcomes: −log q(z′) + const and its gradient, for each of them."""
        if self.outcomes == 1:
            return pairs
        value, grad = (self.grid(part).mean(1, keepdim=True) for part in (pairs.value, pairs.grad))
        wide = (-1, self.outcomes, -1)
        return Energy(value.expand(*wide).flatten(0, 2), grad.expand(*wide, -1).flatten(0, 2))

    def weights(self, value: Float[Tensor, " n"]) -> Float[Tensor, "pools outcomes samples"]:
        """w_ij from the pairs' V; over the samples they sum to one."""
        grid = self.grid(value)
        return torch.softmax(grid.mean(1, keepdim=True) - grid, 2)

    def effective_share(self, value: Float[Tensor, " n"]) -> Float[Tensor, "pools outcomes"]:
        """1/(M Σ_j w_ij²), the share of its pool's samples that are effective for an outcome: 1/M to 1.

        Args:
            value: V at the particles, e.g. `experiment(loop.particles.x)`.
        """
        return 1 / (self.samples * self.weights(value).square().sum(2))


PAIR = Pool()
