"""What every kernel must satisfy; a kernel's test class inherits it and says what its invariant law is.

Moments and Kolmogorov–Smirnov start from the exact stationary law of many independent particles, which must still hold
after a few steps. Increments of weights, detailed balance and covariances are integrals or identities: no statistics.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.potentials import energy_of
from implicit_diffusion.samplers import Info, State, Step
from implicit_diffusion.samplers.weighted_state import exact_draws, reweighted
from tests.helpers.oracles_gibbs import Harmonic, Quartic, advance, line
from tests.helpers.shared_particles import agree, one_kernel
from tests.helpers.together import together

EVENTS = [(1,), (2,), (5,), (2, 3)]
F64 = torch.float64


def normal(n, event, seed, variance=1.0):
    return variance**0.5 * torch.randn(n, *event, generator=torch.Generator().manual_seed(seed), dtype=F64)


def step_from(potential, x, draws, h, momentum=None):
    """A step with numbers of the test's own."""
    return Step(
        x, momentum, energy_of(potential, x), lambda y: energy_of(potential, y), draws, torch.tensor(h, dtype=x.dtype)
    )


def check_moments_of_normal(x, variance):
    """Second and fourth moment of all coordinates, and that coordinates do not correlate, at 4 deviations."""
    n, flat = x.numel(), x.flatten(1) / variance**0.5
    assert abs(flat.mean()) < 4 / math.sqrt(n)
    assert abs(flat.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(flat.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    if flat.shape[1] > 1:
        assert abs((flat[:, 0] * flat[:, -1]).mean()) < 4 / math.sqrt(len(x))


class KernelContract:
    """A kernel's step as a function: its invariant law, its draws, what it costs, what it returns."""

    kernel_class = None
    step_sizes = ()  # at which the law is tested, of a unit Gaussian

    def make(self, h):
        return self.kernel_class(h)

    def variance(self, h):
        """Of the positions at rest on a unit Gaussian."""
        return 1.0

    def at_rest(self, n, event, h, seed):
        """Independent particles from the kernel's own stationary law on a unit Gaussian, as a state."""
        return State(normal(n, event, seed, self.variance(h)))

    def step(self, n=12, event=(2,), dtype=F64, seed=0):
        """A step on the unit Gaussian with the kernel's own draws."""
        kernel, generator = self.make(self.step_sizes[0]), torch.Generator().manual_seed(seed)
        x = normal(n, event, 20).to(dtype)
        # the numbers of a draw depend on the dtype; these are the same in both
        state = kernel.start(x.to(F64), generator)
        state = State(x, None if state.momentum is None else state.momentum.to(dtype))
        draws = tuple(numbers[0].to(dtype) for numbers in kernel.draws(generator, 1, x.to(F64)))
        return kernel, step_from(Harmonic(dtype), x, draws, self.step_sizes[0], state.momentum)

    @pytest.mark.parametrize("event", EVENTS)
    def test_leaves_its_law_invariant(self, event):
        for h in self.step_sizes:
            start = self.at_rest(100_000 // math.prod(event), event, h, 0)
            state, info = advance(self.make(h), Harmonic(), start.x, 4, seed=1, momentum=start.momentum)
            check_moments_of_normal(state.x, self.variance(h))
            self.check_end(state, info, h)

    def check_end(self, state, info, h):
        """What else holds at the end."""

    def test_passes_kolmogorov_and_smirnov_on_a_gaussian(self):
        for h in self.step_sizes:
            start = self.at_rest(40_000, (1,), h, 2)
            state, _ = advance(self.make(h), Harmonic(), start.x, 8, seed=3, momentum=start.momentum)
            law = scipy.stats.norm(scale=math.sqrt(self.variance(h)))
            assert scipy.stats.kstest(state.x[:, 0].numpy(), law.cdf).pvalue > 1e-4

    def test_state_is_apart_from_info(self):
        kernel, step = self.step()
        before = dict(vars(kernel))
        x, momentum = step.x.clone(), None if step.momentum is None else step.momentum.clone()
        state, info = kernel.move(step)
        assert isinstance(state, State) and isinstance(info, Info)
        assert vars(kernel) == before  # a kernel keeps nothing
        assert torch.equal(step.x, x) and (momentum is None or torch.equal(step.momentum, momentum))
        assert state.x.shape == x.shape and (state.x != x).any()
        assert (state.momentum is None) == (step.momentum is None)
        if state.value is not None:
            torch.testing.assert_close(state.value, energy_of(Harmonic(), state.x).value, rtol=1e-12, atol=1e-12)
        assert (info.acceptance is None) == (kernel.target_acceptance is None)

    def test_is_a_function_of_its_draws(self):
        (kernel, one), (_, same), (_, other) = self.step(), self.step(), self.step(seed=1)
        for a, b in zip(kernel.move(one)[0], kernel.move(same)[0], strict=True):
            assert a is b is None or torch.equal(a, b)
        assert not torch.equal(kernel.move(one)[0].x, kernel.move(other)[0].x)
        x, generators = torch.zeros(6, 2, dtype=F64), [torch.Generator().manual_seed(0) for _ in range(2)]
        together = kernel.draws(generators[0], 4, x)
        again = kernel.draws(generators[1], 4, x.mT.contiguous().mT)  # another layout in memory
        for numbers, twin in zip(together, again, strict=True):
            assert len(numbers) == 4 and numbers.unique().numel() == numbers.numel() and torch.equal(numbers, twin)

    def test_works_in_single_and_double_precision(self):
        results = [kernel.move(step) for kernel, step in (self.step(dtype=d) for d in (torch.float32, F64))]
        for single, double in zip(*([*state, *info] for state, info in results), strict=True):
            if double is not None:
                assert single.dtype == torch.float32 and double.dtype == F64
                torch.testing.assert_close(single.to(F64), double, rtol=1e-5, atol=1e-5)

    def test_prepares_a_step_of_its_own(self):
        kernel = self.make(lambda k: self.step_sizes[0] / (k + 1))
        x, generators = normal(5, (2,), 1), [torch.Generator().manual_seed(3) for _ in range(2)]
        state = kernel.start(x, generators[0])
        assert torch.equal(state.x, x) and torch.equal(x, normal(5, (2,), 1))
        step = kernel.prepare(Harmonic(), state, generators[0], 3)
        kernel.start(x, generators[1])
        for numbers, block in zip(step.draws, kernel.draws(generators[1], 1, x), strict=True):
            assert torch.equal(numbers, block[0])
        assert step.x is state.x and step.momentum is state.momentum
        assert step.h.item() == pytest.approx(self.step_sizes[0] / 4) and step.h.dtype == F64
        torch.testing.assert_close(step.here.grad, x)
        torch.testing.assert_close(step.energy(2 * x).grad, 2 * x)

    def test_counts_its_evaluations(self):
        kernel, step = self.step()
        calls = [1]  # the one in `here`

        def energy(y):
            calls.append(1)
            return energy_of(Harmonic(), y)

        kernel.move(step._replace(energy=energy))
        assert len(calls) == kernel.evaluations_per_step

    @pytest.mark.parametrize("h", [0.0, -0.1, math.inf, math.nan])
    def test_step_sizes_are_positive_and_finite(self, h):
        with pytest.raises(InvalidInputError, match="step_size must be positive and finite"):
            self.make(h)
        falling = self.make(lambda k: 0.3 if k < 3 else h)
        assert falling.step_size_at(2) == 0.3
        with pytest.raises(InvalidInputError, match=r"step_size .* for iteration 3"):
            falling.step_size_at(3)

    def test_processes_that_share_the_particles_give_the_run_of_one(self):
        kernel = self.make(self.step_sizes[0])
        agree(together(2, "tests.helpers.shared_particles:one_kernel", kernel), one_kernel(kernel))

    def test_says_so_where_it_knows_no_increment(self):
        kernel, step = self.step()
        if not kernel.weighted:
            with pytest.raises(InvalidInputError, match="no increment of weights; use ULA, MALA or HMC"):
                kernel.forward_part(step, kernel.move(step)[0])
            with pytest.raises(InvalidInputError, match="no increment of weights; use ULA, MALA or HMC"):
                kernel.backward_part(step.x, step.x, step.here, step.h)


class WeightedContract(KernelContract):
    """A kernel that knows the increments of weights."""

    weights_at = ()  # step sizes at which the quadrature resolves them; all of them where there are none

    def weighted_means(self, h, mutate=lambda a: a):
        """Log E e^A and E[φ(X) e^A]/E e^A after one step under θ, seen from θ′, by quadrature over x and ξ."""
        kernel, potential, after = self.make(h), Quartic((0.3, -0.4)), Quartic((0.9, -0.8))
        x, xi = torch.arange(-5, 5.01, 0.025, dtype=F64), torch.arange(-9, 9.01, 0.05, dtype=F64)
        x, xi = (t.reshape(-1, 1) for t in torch.meshgrid(x, xi, indexing="ij"))
        share = torch.softmax(-energy_of(potential, x).value - xi[:, 0].square() / 2, 0)
        mass, mean = 0.0, 0.0
        for u in (0.0, 1.0):  # what is accepted wherever that is possible, and what is not unless it must be
            uniform = torch.full((len(x),), u, dtype=F64)
            step = step_from(potential, x, (xi, uniform)[: 1 + (kernel.target_acceptance is not None)], h)
            state, info = kernel.move(step)
            accepted = torch.ones_like(uniform) if info.acceptance is None else info.acceptance
            start = exact_draws(State(x), step.here.value)
            weighted = start._replace(x=state.x, forward_part=kernel.forward_part(step, state), h=step.h)
            a = mutate(reweighted(kernel, weighted, energy_of(after, state.x)).log_weights)
            w = share * (accepted if u == 0 else 1 - accepted) * a.exp()
            mass, mean = mass + w.sum(), mean + w @ torch.tanh(state.x[:, 0])
        return mass.log().item(), (mean / mass).item()

    def expected(self, spacing=0.1):
        laws = [Quartic((0.3, -0.4)), Quartic((0.9, -0.8))]
        log_z = [line(spacing).law(law)[1] for law in laws]
        return log_z[1] - log_z[0], line(spacing).mean(laws[1], lambda x: torch.tanh(x[:, 0]))

    def test_increments_of_weights_are_exact(self):
        """Jarzynski's equality at any step size, to the accuracy of the quadrature; with a wrong factor it fails."""
        expected = self.expected()
        assert self.expected(0.05) == pytest.approx(expected, abs=1e-9)
        for h in self.weights_at or self.step_sizes:
            assert self.weighted_means(h) == pytest.approx(expected, abs=5e-5)
            wrong = self.weighted_means(h, mutate=lambda a: a / 2)
            assert abs(wrong[0] - expected[0]) > 0.05 and abs(wrong[1] - expected[1]) > 0.05

    def test_increments_are_computed_in_the_widest_dtype(self):
        kernel, step = self.step(dtype=torch.float32)
        state, _ = kernel.move(step)
        parts = kernel.forward_part(step, state), kernel.backward_part(step.x, state.x, step.here, step.h)
        assert all(part.dtype == F64 and part.shape == (len(step.x),) for part in parts)


class MetropolisContract(WeightedContract):
    """A kernel that accepts or rejects, and so is exact."""

    tolerance = 1e-10  # of detailed balance

    def reverse(self, potential, h, x, xi, y):
        """The ξ′ that leads from the proposal y back to x; (x, ξ) ↦ (y, ξ′) keeps volumes."""
        raise NotImplementedError

    def check_end(self, state, info, h):
        assert 0.3 < info.acceptance.mean() < 0.995  # some proposals were rejected

    def test_is_in_detailed_balance(self):
        """π(x) φ(ξ) a(x, ξ) = π(y) φ(ξ′) a(y, ξ′), and the way back leads back, for all pairs of 31 points."""
        potential, points = Quartic(), torch.linspace(-2.5, 2.5, 31, dtype=F64)
        x, xi = (t.reshape(-1, 1) for t in torch.meshgrid(points, points, indexing="ij"))
        sure = torch.zeros(len(x), dtype=F64)  # accepts everything
        for h in self.step_sizes:
            kernel = self.make(h)
            forth, there = kernel.move(step_from(potential, x, (xi, sure), h))
            back_xi = self.reverse(potential, h, x, xi, forth.x)
            back, here = kernel.move(step_from(potential, forth.x, (back_xi, sure), h))
            possible = (there.acceptance > 0) & (here.acceptance > 0)  # no overflow of the quartic far out
            assert possible.double().mean() > 0.9 and (there.acceptance[possible] < 0.9).any()
            rtol = self.tolerance
            torch.testing.assert_close(back.x[possible], x[possible], rtol=10 * rtol, atol=10 * rtol)
            flows = [
                (-energy_of(potential, at).value - noise[:, 0].square() / 2 + info.acceptance.log())[possible]
                for at, noise, info in ((x, xi, there), (forth.x, back_xi, here))
            ]
            torch.testing.assert_close(*flows, rtol=rtol, atol=rtol)

    def test_passes_kolmogorov_and_smirnov_on_a_law_that_is_not_gaussian(self):
        potential, n = Quartic((0.5, -1.5)), 40_000
        x0 = potential.draw(n, torch.Generator().manual_seed(7))
        assert self.p_value(potential, x0) > 1e-4
        for h in self.step_sizes:
            assert self.p_value(potential, advance(self.make(h), potential, x0, 8, seed=8)[0].x) > 1e-4

    @staticmethod
    def p_value(potential, x):
        p, _ = line(0.001).law(potential)
        points, cdf = line(0.001).points[:, 0].numpy(), (p.cumsum(0) - p / 2).numpy()
        return scipy.stats.kstest(x[:, 0].numpy(), lambda y: np.interp(y, points, cdf)).pvalue

    def test_rejects_proposals_that_are_nan(self):
        class Wall(Quartic):
            def forward(self, x):
                return torch.where(x[:, 0] > 1, torch.nan, super().forward(x))

        x = torch.full((1000, 1), 0.9, dtype=F64)
        x = advance(self.make(self.step_sizes[0]), Wall(), x, 3, seed=14)[0].x
        assert x.isfinite().all() and (x <= 1).all() and (x != 0.9).any()
