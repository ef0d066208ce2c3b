"""The numbers of `theory`: what was fitted, what is exact, and what the paper's bounds say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from implicit_diffusion.commands.theory.denoising import QueueResult


@dataclass(frozen=True)
class Rate:
    """The running mean of ‖∇ℓ‖² under the paper's schedules, over the last decade of K; intervals of 95 %.

    Args:
        problem: its name.
        slope: in log–log, of the mean over copies.
        slope_low: lower end.
        slope_high: upper end.
        slope_exact: of the closed form, which one problem has.
        slope_bound: −1/3, the paper's bound without its logarithm.
        slope_bound_with_log: of (2 + log K)/K^{1/3}, fitted in the same way.
        mean: the running mean at the last K.
        mean_se: its standard error.
    """

    problem: str
    slope: float
    slope_low: float
    slope_high: float
    slope_bound: float
    slope_bound_with_log: float
    mean: float
    mean_se: float
    slope_exact: float | None = None


@dataclass(frozen=True)
class FloorPoint:
    """A run with constant steps, after its burn-in.

    Args:
        step_size: h.
        ratio: η/h.
        particles: n.
        floor: E ‖∇ℓ‖².
        floor_se: its standard error.
        floor_predicted: mean-field part and noise, by quadrature, to first order in η/h.
        bias: E ∇ℓ, the root of the mean-field part.
        bias_se: its standard error.
        bias_exact: by quadrature.
        spread: E (∇ℓ − E ∇ℓ)², the part of the floor that is noise.
        spread_se: its standard error.
        floor_exact: the closed form, which one problem has.
    """

    step_size: float
    ratio: float
    particles: int
    floor: float
    floor_se: float
    floor_predicted: float
    bias: float
    bias_se: float
    bias_exact: float
    spread: float
    spread_se: float
    floor_exact: float | None = None


@dataclass(frozen=True)
class Floor:
    """The floors of one problem.

    Args:
        problem: its name.
        exponent_h: a of (E ∇ℓ)² ~ h^a, fitted; None for the problem without bias. Intervals allow for a tenth of every
            value, since a power law is the leading term only.
        exponent_h_low: lower end.
        exponent_h_high: upper end.
        exponent_h_exact: the same of the values by quadrature, with the same weights.
        exponent_h_limit: that of the values by quadrature at the two smallest h.
        exponent_h_bound: 1, of the paper's bound h + η/h.
        exponent_ratio: a of noise ~ (η/h)^a, fitted to the noise.
        exponent_ratio_low: lower end.
        exponent_ratio_high: upper end.
        exponent_ratio_bound: 1, of the paper's bound.
        by_step_size: runs at different h.
        by_ratio: runs at different η/h.
    """

    problem: str
    exponent_h: float | None
    exponent_h_low: float | None
    exponent_h_high: float | None
    exponent_h_exact: float | None
    exponent_h_limit: float | None
    exponent_h_bound: float
    exponent_ratio: float
    exponent_ratio_low: float
    exponent_ratio_high: float
    exponent_ratio_bound: float
    by_step_size: list[FloorPoint]
    by_ratio: list[FloorPoint]


@dataclass(frozen=True)
class Lag:
    """How far particles lag behind θ, as a share of its distance from the optimum.

    Args:
        ratio: η/h.
        unweighted: of plain particles.
        unweighted_se: its standard error.
        unweighted_exact: of the recursion without noise, over the same iterations.
        unweighted_slow: of its slow solution, to which it comes after more of them.
        weighted: of weighted ones, which have none.
        weighted_se: its standard error.
    """

    ratio: float
    unweighted: float
    unweighted_se: float
    unweighted_exact: float
    unweighted_slow: float
    weighted: float
    weighted_se: float


@dataclass(frozen=True)
class Lags:
    """All lags.

    Args:
        exponent: a of unweighted lag ~ (η/h)^a, fitted.
        exponent_low: lower end.
        exponent_high: upper end.
        exponent_bound: 1, of the term η/h in the paper's bound.
        points: by η/h.
    """

    exponent: float
    exponent_low: float
    exponent_high: float
    exponent_bound: float
    points: list[Lag]


@dataclass(frozen=True)
class Summary:
    """The parts that were asked for."""

    rates: list[Rate] | None = None
    floors: list[Floor] | None = None
    queue: list[QueueResult] | None = None
    lag: Lags | None = None


def show(summary: Summary, folder: Path) -> None:
    """Print what was fitted beside what is exact and what the paper's bounds say, and the folder of the run."""
    if summary.rates:
        _show_rates(summary.rates)
    if summary.floors:
        _show_floors(summary.floors)
    if summary.queue:
        _show_queue(summary.queue)
    if summary.lag:
        _show_lag(summary.lag)
    print(f"run       {folder}")


def _show_rates(rates: list[Rate]) -> None:
    print("mean of ‖∇ℓ‖² under the paper's schedules, slope in log–log over the last decade (95 %)")
    for rate in rates:
        exact = "" if rate.slope_exact is None else f", exactly {rate.slope_exact:.3f}"
        print(f"  {rate.problem:9s} {rate.slope:.3f} ({rate.slope_low:.3f} … {rate.slope_high:.3f}){exact}")
    print(f"  bound     {rates[0].slope_bound:.3f}, with its logarithm {rates[0].slope_bound_with_log:.3f}")


def _show_floors(floors: list[Floor]) -> None:
    print("floor of ‖∇ℓ‖² at constant steps: exponents of h (mean field) and of η/h (noise); the bound has 1 and 1")
    for floor in floors:
        h = "no bias"
        if floor.exponent_h is not None:
            h = f"{floor.exponent_h:.2f} ({floor.exponent_h_low:.2f} … {floor.exponent_h_high:.2f})"
            h += f", by quadrature {floor.exponent_h_exact:.2f}, for small h {floor.exponent_h_limit:.2f}"
        low, high = floor.exponent_ratio_low, floor.exponent_ratio_high
        print(f"  {floor.problem:9s} h: {h}; η/h: {floor.exponent_ratio:.2f} ({low:.2f} … {high:.2f})")


def _show_queue(results: list[QueueResult]) -> None:
    print("queue: rate at which the mean settles (closed form; nested), and variance of θ over its closed form")
    for queue in results:
        share, error = queue.variance / queue.variance_exact, queue.variance_se / queue.variance_exact
        print(
            f"  N = {queue.num_steps:2d}, ηG² = {queue.pace:4g}: {queue.rate:.4f} ± {queue.rate_se:.4f} "
            f"({queue.rate_exact:.4f}; {queue.rate_nested:.4f}), {share:.3f} ± {error:.3f}"
        )


def _show_lag(lag: Lags) -> None:
    print(
        f"lag of unweighted particles ~ (η/h)^{lag.exponent:.3f} ({lag.exponent_low:.3f} … {lag.exponent_high:.3f}); "
        "unweighted (closed form), weighted"
    )
    for point in lag.points:
        print(
            f"  η/h = {point.ratio:5g}: {point.unweighted:.4f} ± {point.unweighted_se:.4f} "
            f"({point.unweighted_exact:.4f}), {point.weighted:.4f} ± {point.weighted_se:.4f}"
        )
