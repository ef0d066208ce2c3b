"""Backpropagation through the last rows of a chain alone: cheaper, less memory, and biased.

With x_{N−K} held fixed, the gradient of the objective through the last K rows is the adjoint stopped after K pulls:

    Γ = Σ_{k ≥ N−K} ∇_θ surrogate_k

(DRaFT-K: Clark, Vicol, Swersky and Fleet, *Directly Fine-Tuning Diffusion Models on Differentiable Rewards*, arXiv
2309.17400.) A random K for each trajectory lets the gradient reach early rows too (AlignProp: Prabhudesai, Goyal,
Pathak and Fragkiadaki, *Aligning Text-to-Image Diffusion Models with Reward Backpropagation*, arXiv 2310.03739).
Running costs of earlier rows have no part in Γ.
"""

from __future__ import annotations

import torch

from implicit_diffusion.errors import InvalidInputError, check_integer, check_type
from implicit_diffusion.gradients.adjoint import Adjoint
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain

DEPTH = 2**32 - 2  # key of a trajectory's depth, in place of a row's: no chain has as many rows


class TruncatedBackprop(Adjoint):
    """The adjoint over the last K rows only; with K = N it is `Adjoint`.

    A queue frees a trajectory after K pulls, and keeps no state before x_{N−K}. With K < N, metrics lack the running
    costs, since those of the earlier rows are unknown.

    Args:
        depth: K, the rows that are pulled back.
        random: draw K for each trajectory, by key and uniformly: up to `depth`, and far enough to reach a trained row.

    Raises:
        InvalidInputError: a depth below one.
    """

    def __init__(self, depth: int, *, random: bool = False) -> None:
        check_type("random", random, bool, "use True or False")
        self.depth, self.random = check_integer("depth", depth), random

    @property
    def name(self) -> str:
        return f"TruncatedBackprop(depth={self.depth}, random={self.random})"

    def check(self, chain: Chain, objective: Objective, end: Particles) -> None:
        """Raise `InvalidInputError` as `Adjoint`, and where the depth exceeds the chain or reaches no trained row."""
        check_integer("depth", self.depth, 1, chain.num_steps, note=" (the chain's steps)")
        if self.depth < _least(chain):
            raise InvalidInputError(
                f"depth must be at least {_least(chain)} to reach a trained row, got {self.depth}: the later rows keep "
                "the pretrained network"
            )
        super().check(chain, objective, end)

    def rows(self, chain: Chain) -> range:
        """The last K."""
        return range(chain.num_steps - self.depth, chain.num_steps)

    def reports_costs(self, chain: Chain) -> bool:
        """Whether even the shortest depth is that of the whole chain."""
        return (_least(chain) if self.random else self.depth) == chain.num_steps

    def rows_of(self, chain: Chain, noise: Noise, index: int) -> range:
        """The last K, where K may be random."""
        if not self.random:
            return self.rows(chain)
        generator = noise.generator(index, DEPTH)
        depth = int(torch.randint(_least(chain), self.depth + 1, (), generator=generator))
        return range(chain.num_steps - depth, chain.num_steps)


def _least(chain: Chain) -> int:
    """How many of the last rows are needed to reach a trained one."""
    return chain.num_steps - max(chain.trained_rows, default=0)
