"""What the reward training of a model of the plane can reach, and what it reached, by quadrature.

    optimum of −E_π R + w KL(π‖π_0):        π* ∝ π_0 e^{R/w}

A law that does not fit on the grid has no expectation there: its mass in the outermost cells tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.shared.planar import CELL, HALF, Quadrature
from implicit_diffusion.errors import InvalidInputError, trying
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.objectives.reward import TRIED, Reward
from implicit_diffusion.particles import Particles

AT_EDGE = 1e-5  # mass in the outermost cells above which a law does not fit on the grid


def half_plane(x: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """1 where x_1 ≥ 0."""
    return (x[:, 0] >= 0).to(x.dtype)


class Exact:
    """Expectations under π_0, the trained models and the optimum, by quadrature.

    Args:
        model: π_0.
        reward: R of points in the data's units.

    Raises:
        InvalidInputError: a reward of another shape or not finite, or a model that does not fit the quadrature's grid.
    """

    def __init__(self, model: EnergyModel, reward: Callable[[Tensor], Tensor]) -> None:
        self.quadrature = Quadrature(model.shift, model.scale)
        grid, judge = self.quadrature.grid.to(model.particles), Reward(reward)
        with trying("--reward", f"points of shape {tuple(grid.shape)}"), torch.no_grad(), judge.evaluating():
            values = judge.of(Particles(grid.clone()))
        if not values.is_floating_point() or not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            given = f"NaN or infinity at {bad} points of the grid" if bad else f"{values.dtype}"
            raise InvalidInputError(
                "--reward must return one finite number per point, a floating-point tensor with shape (n,) for input "
                f"(n, 2), got {given}"
            )
        judge.probe(Particles(grid[:: len(grid) // TRIED]))
        outside = (model.particles * model.scale + model.shift).abs().amax(1) > HALF
        if outside.double().mean() > 0.01 or model.scale.amin() < 2 * CELL:
            raise InvalidInputError(
                f"--model: the quadrature covers [−{HALF:g}, {HALF:g}]² in cells of {CELL:g}, which does not fit "
                f"data of mean {model.shift.tolist()} and deviation {model.scale.tolist()}; train on standardised data"
            )
        self.reward = values.double()
        self.log_initial = self.quadrature.log_density(model.potential)[0]
        self.reward_initial = self._mean(self.log_initial, self.reward)

    def optimum(self, weight: float) -> dict[str, float]:
        """Of −E R + w KL: its reward, KL to π_0 and value.

        Raises:
            InvalidInputError: an optimum that the grid does not hold.
        """
        log_density = self._optimal(weight)
        at_edge = self.quadrature.at_edge(log_density)
        if at_edge > AT_EDGE:
            raise InvalidInputError(
                f"--kl-weights {weight:g}: the optimum has {at_edge:.2g} of its mass at the edge of [−{HALF:g}, "
                f"{HALF:g}]², so the quadrature does not hold it; take a larger weight, or a reward that is bounded"
            )
        return self._describe(log_density, weight)

    def frontier(self, weights: Iterable[float]) -> list[tuple[float, float]]:
        """KL to π_0 and reward of the optima."""
        return [(o["kl"], o["reward"]) for o in (self._describe(self._optimal(w), w) for w in weights)]

    def judge(self, trained: EnergyModel, weight: float) -> dict[str, float]:
        """The same of a trained model, and how much of its mass is `at_edge` of the grid; none beyond is seen."""
        log_density, _ = self.quadrature.log_density(trained.potential)
        return self._describe(log_density, weight) | {"at_edge": self.quadrature.at_edge(log_density)}

    def _optimal(self, weight: float) -> Tensor:
        log_density = self.log_initial + self.reward / weight
        return log_density - log_density.logsumexp(0) - math.log(self.quadrature.area)

    def _describe(self, log_density: Tensor, weight: float) -> dict[str, float]:
        reward, kl = self._mean(log_density, self.reward), self._mean(log_density, log_density - self.log_initial)
        return {"reward": reward, "kl": kl, "objective": weight * kl - reward}

    def _mean(self, log_density: Tensor, values: Tensor) -> float:
        return (log_density.exp() @ values).item() * self.quadrature.area
