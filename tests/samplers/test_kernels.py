"""The four kernels under the contract of all kernels, and what each has besides."""

import math

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.potentials import energy_of
from implicit_diffusion.samplers import HMC, MALA, ULA, State, Underdamped, power_law
from tests.helpers.oracles_gibbs import Harmonic, Quartic, advance
from tests.samplers.contract import (
    F64,
    KernelContract,
    MetropolisContract,
    WeightedContract,
    check_moments_of_normal,
    normal,
    step_from,
)


def linear_map(kernel, h):
    """The step on a unit Gaussian as a matrix from (x, p, ξ) to (x, p)."""
    x, p, xi = (row[:, None] for row in torch.eye(3, dtype=F64))
    state, _ = kernel.move(step_from(Harmonic(), x, (xi,), h, p))
    return torch.stack([state.x[:, 0], torch.zeros(3, dtype=F64) if state.momentum is None else state.momentum[:, 0]])


class TestULA(WeightedContract):
    kernel_class = ULA
    step_sizes = (0.1, 0.5, 1.2)
    weights_at = (0.1, 0.2)  # beyond, e^A has a tail on the quartic that no grid reaches

    def variance(self, h):
        return 1 / (1 - h / 2)

    def check_end(self, state, info, h):
        assert abs(state.x.square().mean() - 1) > 8 * math.sqrt(2 / state.x.numel())  # the bias itself is seen

    @pytest.mark.parametrize("h", [0.05, 0.7, 1.5])
    def test_the_stationary_variance_by_linear_algebra(self, h):
        m = linear_map(ULA(h), h)
        assert (m[0, 2] ** 2 / (1 - m[0, 0] ** 2)).item() == pytest.approx(self.variance(h), rel=1e-12)


class TestMALA(MetropolisContract):
    kernel_class = MALA
    step_sizes = (0.4, 0.1, 0.6)

    def reverse(self, potential, h, x, xi, y):
        return (x - y + h * energy_of(potential, y).grad) / math.sqrt(2 * h)

    def check_end(self, state, info, h):
        assert 0.3 < info.acceptance.mean() < (1.0 if h == 0.1 else 0.995)

    def test_without_the_metropolis_test_the_same_steps_are_seen_to_be_wrong(self):
        potential = Quartic((0.5, -1.5))
        x0 = potential.draw(40_000, torch.Generator().manual_seed(7))
        assert self.p_value(potential, advance(ULA(0.4), potential, x0, 8, seed=8)[0].x) < 1e-8


class TestHMC(MetropolisContract):
    kernel_class = HMC
    step_sizes = (0.5, 0.3)
    leapfrogs = 3
    tolerance = 1e-9

    def make(self, h):
        return HMC(h, self.leapfrogs)

    def check_end(self, state, info, h):
        assert 0.3 < info.acceptance.mean() < (1.0 if h == 0.3 else 0.995)

    def reverse(self, potential, h, x, xi, y):
        for _ in range(self.leapfrogs):
            xi = xi - h / 2 * energy_of(potential, x).grad
            x = x + h * xi
            xi = xi - h / 2 * energy_of(potential, x).grad
        torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-11)
        return -xi


class TestHMCOfOneLeapfrog(TestHMC):
    step_sizes = (1.0, 0.7)
    leapfrogs = 1

    def check_end(self, state, info, h):
        assert 0.3 < info.acceptance.mean() < 0.995

    def test_is_mala(self):
        """HMC with L = 1 and step h proposes, and accepts, as MALA does with step h²/2."""
        potential, h = Quartic(), 0.7
        x, xi = normal(500, (1,), 9), normal(500, (1,), 10)
        draws = (xi, torch.rand(500, generator=torch.Generator().manual_seed(11), dtype=F64))
        results = [
            kernel.move(step_from(potential, x, draws, s)) for kernel, s in ((HMC(h, 1), h), (MALA(h), h**2 / 2))
        ]
        for a, b in zip(*([*state, *info] for state, info in results), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12)


class TestUnderdamped(KernelContract):
    kernel_class = Underdamped
    step_sizes = (0.3, 1.0)

    def make(self, h):
        return Underdamped(h, friction=0.8)

    def at_rest(self, n, event, h, seed):
        x = normal(n, event, seed)
        return State(x, normal(n, event, seed + 5, 1 - h**2 / 4) + h / 2 * x)  # the half-kick that `velocity` undoes

    def check_end(self, state, info, h):
        """The velocities are too slow by h²/4."""
        velocity = self.make(h).velocity(state.momentum, energy_of(Harmonic(), state.x), h)
        check_moments_of_normal(velocity, 1 - h**2 / 4)

    @pytest.mark.parametrize("h", [0.05, 0.7, 1.5])
    def test_the_stationary_covariance_by_linear_algebra(self, h):
        """Σ = A Σ Aᵀ + b bᵀ, solved exactly."""
        m = linear_map(Underdamped(h, 1.3), h)
        a, b = m[:, :2], m[:, 2:]
        covariance = torch.linalg.solve(torch.eye(4, dtype=F64) - torch.kron(a, a), (b @ b.T).flatten()).view(2, 2)
        closing = torch.tensor([[1.0, 0.0], [-h / 2, 1.0]], dtype=F64)
        expected = torch.diag(torch.tensor([1.0, 1 - h**2 / 4], dtype=F64))
        torch.testing.assert_close(closing @ covariance @ closing.T, expected, rtol=1e-11, atol=1e-11)


def test_other_arguments():
    for friction in (0.0, -1.0, math.inf):
        with pytest.raises(InvalidInputError, match="friction must be positive"):
            Underdamped(0.1, friction)
    with pytest.raises(InvalidInputError, match="leapfrogs must be"):
        HMC(0.1, 0)


def test_power_laws_are_those_of_the_paper():
    h, eta = power_law(0.5, 1 / 3), power_law(0.5, 2 / 3)
    assert h(0) == 0.5 and h(7) == pytest.approx(0.25) and eta(7) == pytest.approx(0.125)
    kernel = ULA(h)
    assert kernel.step_size_at(26) == pytest.approx(0.5 / 3)
