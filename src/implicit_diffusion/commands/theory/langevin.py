"""The single loop on the problems of `problems`: with the paper's schedules, and with constant steps.

The paper's schedules are h_k = c k^{−1/3} and η_k = h_k k^{−1/3}, under which the mean of ‖∇ℓ(θ_k)‖² over k ≤ K is at
most c′ (2 + log K)/K^{1/3} (Marion et al., arXiv 2402.05468). At constant h and η the bound leaves a floor of order
h + η/h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion.commands.theory.problems import PROBLEMS, Copies, Problem
from implicit_diffusion.loops import Single, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.samplers import ULA, power_law

FIRST_STEP, RECORDS = 0.5, 120  # c, and records of a run
START, TRAIN = range(2)  # streams of noise
RELAXATIONS = 3.0  # of θ, before the floor is measured


@dataclass(frozen=True)
class ConstantSteps:
    """A run with constant steps.

    Args:
        step_size: h.
        ratio: η/h.
        particles: n.
        copies: S, of each problem.
        measured: iterations over which the floor is measured, and which the burn-in has at most.
        seed: of its noise.
    """

    step_size: float
    ratio: float
    particles: int
    copies: int
    measured: int
    seed: int

    @property
    def lr(self) -> float:
        """η."""
        return self.ratio * self.step_size

    @property
    def burn_in(self) -> int:
        """Iterations before the floor is measured: three relaxation times 1/(ηℓ'') of the slowest problem."""
        slowest = min(problem.curvature(problem.optimum) for problem in PROBLEMS)
        return min(self.measured, math.ceil(RELAXATIONS / (slowest * self.lr)))


def follow(
    problems: Sequence[Problem],
    start: Float[Tensor, "problems copies"],
    x: Float[Tensor, "n problems copies"],
    iterations: int,
    noise: Noise,
    step_size: float | Callable[[int], float],
    lr: float | Callable[[int], float],
) -> Float[Tensor, "iterations problems copies"]:
    """θ_k for 0 ≤ k < iterations.

    Args:
        problems: one for each row of θ.
        start: θ_0.
        x: X_0.
        iterations: how many.
        noise: of the run.
        step_size: h, or k ↦ h_k.
        lr: η, or k ↦ η_k.
    """
    potential = Copies(problems, start)
    sgd = torch.optim.SGD(potential.parameters(), lr=1.0 if callable(lr) else lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lr) if callable(lr) else None
    loop = Single(
        potential,
        ULA(step_size),
        ForwardKL(potential.data),
        Update(sgd, schedule=schedule),
        particles=x,
        noise=noise,
    )
    path = start.new_empty(iterations, *start.shape)
    for k in range(iterations):
        path[k] = potential.theta.detach()
        loop.step()
    return path


def gradients(
    problems: Sequence[Problem], path: Float[Tensor, "iterations problems copies"]
) -> Float[Tensor, "iterations problems copies"]:
    """∇ℓ(θ) along a path."""
    return torch.stack([problem.gradient(path[:, i]) for i, problem in enumerate(problems)], 1)


def paper_steps(iterations: int) -> list[tuple[float, float]]:
    """(h_k, η_k) of the paper's schedules."""
    h, lr = power_law(FIRST_STEP, 1 / 3), power_law(FIRST_STEP, 2 / 3)
    return [(h(k), lr(k)) for k in range(iterations)]


def records(iterations: int) -> Int[Tensor, " records"]:
    """Numbers K of iterations, equally far apart in their logarithms, the last among them."""
    exponents = torch.linspace(0, math.log(iterations), RECORDS, dtype=torch.float64)
    return exponents.exp().round().long().unique()


def running_means(iterations: int, particles: int, copies: int, seed: int) -> Float[Tensor, "records problems copies"]:
    """The mean of ∇ℓ(θ_k)² over k < K under the paper's schedules, for the K of `records`."""
    start = torch.tensor([problem.start for problem in PROBLEMS], dtype=torch.float64)[:, None].expand(-1, copies)
    h, lr = power_law(FIRST_STEP, 1 / 3), power_law(FIRST_STEP, 2 / 3)
    x = Noise(seed).normal((particles, *start.shape), START, dtype=start.dtype)
    path = follow(PROBLEMS, start, x, iterations, Noise(seed).stream(TRAIN), h, lr)
    K = records(iterations)
    return gradients(PROBLEMS, path).square().cumsum(0)[K - 1] / K[:, None, None]


def settled(run: ConstantSteps) -> dict[str, Float[Tensor, "problems copies"]]:
    """Means over time of ∇ℓ ("bias") and of ∇ℓ² ("floor") after the burn-in, from θ* and X_0 ~ π_θ* on."""
    noise, shape = Noise(run.seed), (len(PROBLEMS), run.copies)
    levels = torch.rand((run.particles, *shape), generator=noise.generator(START), dtype=torch.float64)
    rows = zip(PROBLEMS, levels.unbind(1), strict=True)
    x = torch.stack([problem.quantiles(problem.optimum, row.contiguous()) for problem, row in rows], 1)
    start = torch.tensor([problem.optimum for problem in PROBLEMS], dtype=torch.float64)[:, None].expand(shape)
    iterations = run.burn_in + run.measured
    path = follow(PROBLEMS, start, x, iterations, noise.stream(TRAIN), run.step_size, run.lr)[run.burn_in :]
    slopes = gradients(PROBLEMS, path)
    return {"bias": slopes.mean(0), "floor": slopes.square().mean(0)}
