"""Kernels leave the law invariant that they say they do: by linear algebra, by moments, by Kolmogorov–Smirnov.

Moments start from the exact stationary law of many independent particles and must still hold after a few steps.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.potentials import energy_of
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped, power_law
from tests.helpers.oracles_gibbs import Harmonic, Quartic, advance, line

EVENTS = [(1,), (2,), (5,), (2, 3)]
F64 = torch.float64


def normal(n, event, seed, variance=1.0):
    return variance**0.5 * torch.randn(n, *event, generator=torch.Generator().manual_seed(seed), dtype=F64)


def has_moments_of_normal(x, variance):
    """Second and fourth moment of all coordinates, and that coordinates do not correlate, at 4 deviations."""
    n, flat = x.numel(), x.flatten(1) / variance**0.5
    assert abs(flat.mean()) < 4 / math.sqrt(n)
    assert abs(flat.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(flat.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    if flat.shape[1] > 1:
        assert abs((flat[:, 0] * flat[:, -1]).mean()) < 4 / math.sqrt(len(x))


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("h", [0.1, 0.5, 1.2])
def test_ula_has_its_biased_variance(event, h):
    variance = 1 / (1 - h / 2)
    x = advance(ULA(h), Harmonic(), normal(100_000 // math.prod(event), event, 0, variance), 4, seed=1).x
    has_moments_of_normal(x, variance)
    assert abs(x.square().mean() - 1) > 8 * math.sqrt(2 / x.numel())  # the bias itself is seen


KERNELS = {"mala": MALA(0.4), "hmc": HMC(0.5, 3), "hmc, one leapfrog": HMC(1.0, 1)}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", KERNELS)
def test_exact_kernels_have_exact_moments(name, event):
    move = advance(KERNELS[name], Harmonic(), normal(100_000 // math.prod(event), event, 2), 4, seed=3)
    has_moments_of_normal(move.x, 1.0)
    assert 0.3 < move.acceptance.mean() < 0.995  # some proposals were refused


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("h", [0.3, 1.0])
def test_baoab_has_exact_positions_and_slow_velocities(event, h):
    n = 100_000 // math.prod(event)
    kernel, x = Underdamped(h, friction=0.8), normal(n, event, 4)
    momentum = normal(n, event, 5, 1 - h**2 / 4) + h / 2 * x  # the half-kick that `velocity` takes away
    move = advance(kernel, Harmonic(), x, 4, seed=6, momentum=momentum)
    has_moments_of_normal(move.x, 1.0)
    has_moments_of_normal(kernel.velocity(move.momentum, energy_of(Harmonic(), move.x), h), 1 - h**2 / 4)


def linear_map(kernel, h):
    """The step on a unit Gaussian as a matrix from (x, p, ξ) to (x, p)."""
    x, p, xi = (row[:, None] for row in torch.eye(3, dtype=F64))
    step = torch.tensor(h, dtype=F64)
    move = kernel.move(x, p, energy_of(Harmonic(), x), lambda y: energy_of(Harmonic(), y), (xi,), step)
    return torch.stack([move.x[:, 0], torch.zeros(3, dtype=F64) if move.momentum is None else move.momentum[:, 0]])


@pytest.mark.parametrize("h", [0.05, 0.7, 1.5])
def test_stationary_covariances_by_linear_algebra(h):
    """Σ = A Σ Aᵀ + b bᵀ, solved exactly: no statistics."""
    m = linear_map(ULA(h), h)
    assert (m[0, 2] ** 2 / (1 - m[0, 0] ** 2)).item() == pytest.approx(1 / (1 - h / 2), rel=1e-12)
    m = linear_map(Underdamped(h, 1.3), h)
    a, b = m[:, :2], m[:, 2:]
    covariance = torch.linalg.solve(torch.eye(4, dtype=F64) - torch.kron(a, a), (b @ b.T).flatten()).view(2, 2)
    closing = torch.tensor([[1.0, 0.0], [-h / 2, 1.0]], dtype=F64)
    expected = torch.diag(torch.tensor([1.0, 1 - h**2 / 4], dtype=F64))
    torch.testing.assert_close(closing @ covariance @ closing.T, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_kolmogorov_smirnov_on_a_law_that_is_not_gaussian(name):
    kernel, potential, n = KERNELS[name], Quartic((0.5, -1.5)), 40_000
    x0 = potential.draw(n, torch.Generator().manual_seed(7))
    p, _ = line(0.001).law(potential)
    points, cdf = line(0.001).points[:, 0].numpy(), (p.cumsum(0) - p / 2).numpy()

    def p_value(x):
        return scipy.stats.kstest(x[:, 0].numpy(), lambda y: np.interp(y, points, cdf)).pvalue

    assert p_value(x0) > 1e-4
    assert p_value(advance(kernel, potential, x0, 8, seed=8).x) > 1e-4
    if name == "mala":  # the same steps without the test of Metropolis are seen to be wrong
        assert p_value(advance(ULA(0.4), potential, x0, 8, seed=8).x) < 1e-8


@pytest.mark.parametrize("h", [0.1, 0.6])
def test_mala_is_in_detailed_balance(h):
    """π(x) q(y|x) a(x, y) is symmetric, for all pairs of 31 points, with the acceptance that the kernel itself has."""
    potential, step = Quartic(), torch.tensor(h, dtype=F64)
    points = torch.linspace(-2.5, 2.5, 31, dtype=F64)
    x, y = (t.reshape(-1, 1) for t in torch.meshgrid(points, points, indexing="ij"))
    here = energy_of(potential, x)
    xi = (y - x + h * here.grad) / math.sqrt(2 * h)
    move = MALA(h).move(x, None, here, lambda z: energy_of(potential, z), (xi, torch.zeros(len(x), dtype=F64)), step)
    torch.testing.assert_close(move.x, torch.where(move.acceptance[:, None] > 0, y, x), rtol=1e-12, atol=1e-12)
    log_flow = -here.value - xi[:, 0].square() / 2 + move.acceptance.log()
    torch.testing.assert_close(log_flow.view(31, 31), log_flow.view(31, 31).T, rtol=1e-10, atol=1e-10)
    assert (move.acceptance < 0.9).any()


def test_one_leapfrog_is_mala():
    """HMC with L = 1 and step h proposes, and accepts, as MALA does with step h²/2."""
    potential, h = Quartic(), 0.7
    x, xi = normal(500, (1,), 9), normal(500, (1,), 10)
    draws = (xi, torch.rand(500, generator=torch.Generator().manual_seed(11), dtype=F64))
    moves = [
        kernel.move(
            x, None, energy_of(potential, x), lambda y: energy_of(potential, y), draws, torch.tensor(s, dtype=F64)
        )
        for kernel, s in ((HMC(h, 1), h), (MALA(h), h**2 / 2))
    ]
    for a, b in zip(*moves, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_hmc_goes_back_where_it_came_from():
    """Leapfrogs with the momentum turned round: position and acceptance ratio are reversible."""
    potential, h, kernel = Quartic(), torch.tensor(0.3, dtype=F64), HMC(0.3, 4)
    x, p, zero = normal(200, (1,), 12), normal(200, (1,), 13), torch.zeros(200, dtype=F64)

    def leapfrogs(x, p):
        for _ in range(4):
            p = p - h / 2 * energy_of(potential, x).grad
            x = x + h * p
            p = p - h / 2 * energy_of(potential, x).grad
        return x, p

    def accepted(x, p):
        return kernel.move(x, None, energy_of(potential, x), lambda y: energy_of(potential, y), (p, zero), h)

    y, q = leapfrogs(x, p)
    there, back = accepted(x, p), accepted(y, -q)
    torch.testing.assert_close(there.x, y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(back.x, x, rtol=1e-9, atol=1e-9)
    flow = [
        -energy_of(potential, a).value - b[:, 0].square() / 2 + m.acceptance.log()
        for a, b, m in ((x, p, there), (y, q, back))
    ]
    torch.testing.assert_close(*flow, rtol=1e-9, atol=1e-9)


def test_a_proposal_that_is_nan_is_refused():
    class Wall(Quartic):
        def forward(self, x):
            return torch.where(x[:, 0] > 1, torch.nan, super().forward(x))

    x = torch.full((1000, 1), 0.9, dtype=F64)
    x = advance(MALA(0.5), Wall(), x, 3, seed=14).x
    assert x.isfinite().all() and (x <= 1).all() and (x != 0.9).any()


@pytest.mark.parametrize("kernel", [ULA, MALA, HMC, Underdamped])
@pytest.mark.parametrize("h", [0.0, -0.1, math.inf, math.nan])
def test_step_sizes_are_positive_and_finite(kernel, h):
    with pytest.raises(InvalidInputError, match="step_size must be positive and finite"):
        kernel(h)
    falling = kernel(lambda k: 0.3 if k < 3 else h)
    assert falling.step(2) == 0.3
    with pytest.raises(InvalidInputError, match=r"step_size .* for iteration 3"):
        falling.step(3)


def test_other_arguments():
    for friction in (0.0, -1.0, math.inf):
        with pytest.raises(InvalidInputError, match="friction must be positive"):
            Underdamped(0.1, friction)
    with pytest.raises(InvalidInputError, match="leapfrogs must be"):
        HMC(0.1, 0)
    x = torch.zeros(2, 1, dtype=F64)
    with pytest.raises(InvalidInputError, match="no increment of weights"):
        Underdamped(0.1).repay(x, x, energy_of(Harmonic(), x), torch.tensor(0.1, dtype=F64))


def test_power_laws_are_those_of_the_paper():
    h, eta = power_law(0.5, 1 / 3), power_law(0.5, 2 / 3)
    assert h(0) == 0.5 and h(7) == pytest.approx(0.25) and eta(7) == pytest.approx(0.125)
    kernel = ULA(h)
    assert kernel.step(26) == pytest.approx(0.5 / 3)


def test_evaluations_are_counted():
    for kernel in (ULA(0.1), MALA(0.1), HMC(0.1, 4), Underdamped(0.1)):
        calls, x = [], torch.zeros(3, 2, dtype=F64)
        draws = tuple(d[0] for d in kernel.draws(torch.Generator(), 1, x))

        def energy(y, calls=calls):
            calls.append(1)
            return energy_of(Harmonic(), y)

        kernel.move(x, torch.zeros_like(x), energy(x), energy, draws, torch.tensor(0.1, dtype=F64))
        assert len(calls) == kernel.evaluations
