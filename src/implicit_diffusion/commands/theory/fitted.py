"""From the results of `theory` to its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.theory import linear
from implicit_diffusion.commands.theory.config import Config
from implicit_diffusion.commands.theory.fits import Interval, log_slope, mean_slope, power_law_exponent
from implicit_diffusion.commands.theory.lag import FIRST, LAST, STEP_SIZE
from implicit_diffusion.commands.theory.langevin import paper_steps, records
from implicit_diffusion.commands.theory.mean_field import MeanField
from implicit_diffusion.commands.theory.problems import LOCATION, PROBLEMS
from implicit_diffusion.commands.theory.runs import FloorRun, Results
from implicit_diffusion.commands.theory.summary import Floor, FloorPoint, Lag, Lags, Rate, Summary

RATE, ORDER = -1 / 3, 1.0  # exponents of the paper's bounds: of K, and of h and of η/h in the floor
DECADE, ALLOWED = 10, 0.1  # slopes are fitted from K/10 on; share of a value by which power laws may miss it


def summarise(config: Config, results: Results) -> Summary:
    """The numbers of a study."""
    rates, floors, queue, lag = results.rates, results.floors, results.queue, results.lag
    return Summary(
        rates=None if rates is None else [_rate(config, means, i) for i, means in enumerate(rates.unbind(1))],
        floors=None if floors is None else [_floor(*floors, i) for i in range(len(PROBLEMS))],
        queue=None if queue is None else [numbers for numbers, _ in queue],
        lag=None if lag is None else _lags(lag),
    )


def _rate(config: Config, means: Float[Tensor, "records copies"], i: int) -> Rate:
    K = records(config.steps)
    x, late = K.double(), config.steps <= DECADE * K
    fitted, bound = mean_slope(x[late], means[late]), (2 + x.log()) / x ** (1 / 3)
    exact = None
    if PROBLEMS[i] is LOCATION:
        squares = linear.squared_gradients(paper_steps(config.steps), config.particles, LOCATION.start)
        exact = log_slope(x[late], (squares.cumsum(0)[K - 1] / x)[late])
    return Rate(
        problem=PROBLEMS[i].name,
        slope=fitted.value,
        slope_low=fitted.low,
        slope_high=fitted.high,
        slope_bound=RATE,
        slope_bound_with_log=log_slope(x[late], bound[late]),
        mean=means[-1].mean().item(),
        mean_se=_error(means[-1]),
        slope_exact=exact,
    )


def _floor(of_step_sizes: list[FloorRun], of_ratios: list[FloorRun], i: int) -> Floor:
    by_step_size, by_ratio = ([_point(run, i) for run in runs] for runs in (of_step_sizes, of_ratios))
    noise = _exponent(by_ratio, "ratio", "spread")
    bias, exact, limit = None, None, None
    if PROBLEMS[i] is not LOCATION:
        fits = (_exponent(by_step_size, "step_size", "bias", of) for of in ("bias", "bias_exact"))
        bias, exact = (Interval(2 * fit.value, 2 * fit.low, 2 * fit.high) for fit in fits)
        limit = 2 * log_slope(_column(by_step_size[:2], "step_size"), _column(by_step_size[:2], "bias_exact"))
    return Floor(
        problem=PROBLEMS[i].name,
        exponent_h=None if bias is None else bias.value,
        exponent_h_low=None if bias is None else bias.low,
        exponent_h_high=None if bias is None else bias.high,
        exponent_h_exact=None if exact is None else exact.value,
        exponent_h_limit=limit,
        exponent_h_bound=ORDER,
        exponent_ratio=noise.value,
        exponent_ratio_low=noise.low,
        exponent_ratio_high=noise.high,
        exponent_ratio_bound=ORDER,
        by_step_size=by_step_size,
        by_ratio=by_ratio,
    )


def _point(run: FloorRun, i: int) -> FloorPoint:
    steps, measured = run
    mean_field = MeanField(PROBLEMS[i], steps.step_size)
    floor, bias = measured["floor"][i], measured["bias"][i]
    spread = floor - 2 * bias.mean() * bias + bias.mean().square()
    exact = linear.floor(steps.step_size, steps.lr, steps.particles) if PROBLEMS[i] is LOCATION else None
    return FloorPoint(
        step_size=steps.step_size,
        ratio=steps.ratio,
        particles=steps.particles,
        floor=floor.mean().item(),
        floor_se=_error(floor),
        floor_predicted=mean_field.floor(steps.ratio, steps.particles),
        bias=bias.mean().item(),
        bias_se=_error(bias),
        bias_exact=mean_field.bias,
        spread=spread.mean().item(),
        spread_se=_error(spread),
        floor_exact=exact,
    )


def _lags(lag: dict[float, tuple[Float[Tensor, " copies"], Float[Tensor, " runs"]]]) -> Lags:
    points = [
        Lag(
            ratio=ratio,
            unweighted=unweighted.mean().item(),
            unweighted_se=_error(unweighted),
            unweighted_exact=linear.lag_over(STEP_SIZE, ratio * STEP_SIZE, FIRST, LAST),
            unweighted_slow=linear.lag(ratio),
            weighted=weighted.mean().item(),
            weighted_se=_error(weighted),
        )
        for ratio, (unweighted, weighted) in lag.items()
    ]
    fit = _exponent(points, "ratio", "unweighted")
    return Lags(fit.value, fit.low, fit.high, ORDER, points)


def _exponent(points: Sequence[object], x: str, y: str, of: str | None = None) -> Interval:
    """The exponent of y in x, where a tenth of y is allowed for besides its error: a power law is a leading term only.

    Args:
        points: with x, y and the standard error of y.
        x: name of the abscissa.
        y: name of what was measured.
        of: name of other values to fit with the same weights.
    """
    measured = _column(points, y)
    errors = torch.hypot(_column(points, f"{y}_se"), ALLOWED * measured)
    return power_law_exponent(_column(points, x), measured if of is None else _column(points, of), errors)


def _column(points: Sequence[object], name: str) -> Float[Tensor, " points"]:
    return torch.tensor([getattr(point, name) for point in points], dtype=torch.float64)


def _error(values: Float[Tensor, " copies"]) -> float:
    """The standard error of their mean."""
    return values.std().item() / math.sqrt(len(values))
