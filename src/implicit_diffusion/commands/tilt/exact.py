"""What the reward training of a model of the plane can reach, and what it reached, by quadrature.

    optimum of −E_π R + w KL(π‖π_0):        π* ∝ π_0 e^{R/w}

A law that does not fit on the grid has no expectation there: its mass in the outermost cells tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, trying
from implicit_diffusion.evaluation.quadrature import CELL, HALF_SIDE, Quadrature
from implicit_diffusion.function_checks import TRIED
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.objectives.reward import Reward
from implicit_diffusion.particles import Particles

AT_EDGE = 1e-5  # mass in the outermost cells above which a law does not fit on the grid


def half_plane(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """1 where x_1 ≥ 0."""
    return (x[:, 0] >= 0).to(x.dtype)


@dataclass(frozen=True)
class Tradeoff:
    """A law π beside π_0.

    Args:
        reward: E_π R.
        kl: KL(π‖π_0), in nats.
        objective: −reward + w kl.
    """

    reward: float
    kl: float
    objective: float


@dataclass(frozen=True)
class TrainedTradeoff(Tradeoff):
    """The same of a trained model; `at_edge` is its mass in the outermost cells of the grid, none beyond is seen."""

    at_edge: float


class ExactTilt:
    """Expectations under π_0, the trained models and the optimum, by quadrature.

    Args:
        model: π_0.
        reward: R of points in the data's units, (n, 2) ↦ (n,).

    Raises:
        InvalidInputError: a reward of another shape or not finite, or a model that does not fit the quadrature's grid.
    """

    def __init__(self, model: EnergyModel, reward: Callable[[Tensor], Tensor]) -> None:
        self.quadrature = Quadrature(model.shift, model.scale)
        points, judge = self.quadrature.grid.points.to(model.particles), Reward(reward)
        with trying("--reward", f"points of shape {tuple(points.shape)}"), torch.no_grad(), judge.evaluating():
            values = judge.of(Particles(points.clone()))
        if not values.is_floating_point() or not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            given = f"NaN or infinity at {bad} points of the grid" if bad else f"{values.dtype}"
            raise InvalidInputError(
                "--reward must return one finite number per point, a floating-point tensor with shape (n,) for input "
                f"(n, 2), got {given}"
            )
        judge.probe(Particles(points[:: len(points) // TRIED]))
        outside = (model.particles * model.scale + model.shift).abs().amax(1) > HALF_SIDE
        if outside.double().mean() > 0.01 or model.scale.amin() < 2 * CELL:
            raise InvalidInputError(
                f"--model: the quadrature covers [−{HALF_SIDE:g}, {HALF_SIDE:g}]² in cells of {CELL:g}, which does not "
                f"fit data of mean {model.shift.tolist()} and deviation {model.scale.tolist()}; train on standardised "
                "data"
            )
        self.reward = values.double()
        self.log_initial = self.quadrature.log_density(model.potential)[0]
        self.reward_initial = self._mean(self.log_initial, self.reward)

    def optimum(self, weight: float) -> Tradeoff:
        """The minimum of −E R + `weight` KL.

        Raises:
            InvalidInputError: an optimum that does not fit on the grid.
        """
        log_density = self._optimal(weight)
        at_edge = self.quadrature.grid.mass_at_edge(log_density)
        if at_edge > AT_EDGE:
            raise InvalidInputError(
                f"--kl-weights {weight:g}: the optimum has {at_edge:.2g} of its mass at the edge of [−{HALF_SIDE:g}, "
                f"{HALF_SIDE:g}]², so the quadrature does not hold it; use a larger weight, or a reward that is bounded"
            )
        return Tradeoff(*self._figures(log_density, weight))

    def frontier(self, weights: Iterable[float]) -> list[tuple[float, float]]:
        """KL to π_0 and reward of the optima."""
        optima = (Tradeoff(*self._figures(self._optimal(w), w)) for w in weights)
        return [(optimum.kl, optimum.reward) for optimum in optima]

    def judge(self, trained: EnergyModel, weight: float) -> TrainedTradeoff:
        """What a trained model reached."""
        log_density, _ = self.quadrature.log_density(trained.potential)
        return TrainedTradeoff(*self._figures(log_density, weight), self.quadrature.grid.mass_at_edge(log_density))

    def _optimal(self, weight: float) -> Float[Tensor, " points"]:
        log_density = self.log_initial + self.reward / weight
        return log_density - log_density.logsumexp(0) - math.log(self.quadrature.grid.area)

    def _figures(self, log_density: Float[Tensor, " points"], weight: float) -> tuple[float, float, float]:
        """Reward, KL to π_0 and objective."""
        reward, kl = self._mean(log_density, self.reward), self._mean(log_density, log_density - self.log_initial)
        return reward, kl, weight * kl - reward

    def _mean(self, log_density: Float[Tensor, " points"], values: Float[Tensor, " points"]) -> float:
        return (log_density.exp() @ values).item() * self.quadrature.grid.area
