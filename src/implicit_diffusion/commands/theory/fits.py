"""Fits of power laws, with confidence intervals of 95 %."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

NORMAL = 1.96  # standard errors on either side that hold 95 %
EXPONENTS = -2.0, 8.0, 100_001  # that are tried: from, to, how many


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval.

    Args:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, error: float) -> Interval:
        """From a standard error."""
        return cls(value, value - NORMAL * error, value + NORMAL * error)


def log_slope(x: Float[Tensor, " points"], y: Float[Tensor, " points"]) -> float:
    """The slope of log y on log x by least squares."""
    a, b = x.log(), y.log()
    a = a - a.mean()
    return ((a @ b) / (a @ a)).item()


def mean_slope(x: Float[Tensor, " points"], ys: Float[Tensor, "points copies"]) -> Interval:
    """The slope of the log of the mean curve over copies; its error by the jackknife, since points are dependent."""
    total, copies = ys.sum(1), ys.shape[1]
    whole = log_slope(x, total)
    without = torch.tensor([log_slope(x, total - y) for y in ys.unbind(1)], dtype=torch.float64)
    error = math.sqrt((copies - 1) ** 2 / copies * without.var().item())
    return Interval.around(whole, error)


def power_law_exponent(
    x: Float[Tensor, " points"], y: Float[Tensor, " points"], errors: Float[Tensor, " points"]
) -> Interval:
    """The exponent a of y = c x^a, by weighted least squares in y itself: points below their error count for little.

    For every a the best c is linear regression, so that the misfit is a function of a alone. The interval holds the a
    whose misfit is at most 3.84 above the smallest (χ² of one degree of freedom).

    Args:
        x: positive.
        y: measured, independent of each other.
        errors: standard errors of y.
    """
    exponents = torch.linspace(*EXPONENTS, dtype=torch.float64)
    models = (exponents[:, None] * (x.double().log() - x.double().log().mean())).exp() / errors.double()
    scaled = y.double() / errors.double()
    misfit = scaled.square().sum() - (models @ scaled).square() / models.square().sum(1)
    near = exponents[misfit <= misfit.min() + NORMAL**2]
    return Interval(exponents[misfit.argmin()].item(), near[0].item(), near[-1].item())
