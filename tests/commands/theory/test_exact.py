"""What `theory` calls exact, against finite differences, other quadrature, other closed forms and the loops."""

import math

import pytest
import torch

from implicit_diffusion.commands.theory import denoising, linear
from implicit_diffusion.commands.theory.denoising import Denoising, run_queue
from implicit_diffusion.commands.theory.fits import log_slope, mean_slope, power_law_exponent
from implicit_diffusion.commands.theory.lag import lags
from implicit_diffusion.commands.theory.langevin import (
    ConstantSteps,
    follow,
    gradients,
    paper_steps,
    records,
    running_means,
    settled,
)
from implicit_diffusion.commands.theory.mean_field import MeanField
from implicit_diffusion.commands.theory.problems import LOCATION, MODES, PROBLEMS, SCALE, Copies
from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.loops import Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables import ou_reverse_sde


def number(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_loss_and_gradient(problem):
    """ℓ is minus the mean log-density, normalised by quadrature; ∇ℓ = E_data ∂V − E_π ∂V, and is 0 at the optimum."""
    x = torch.linspace(-14, 14, 4001, dtype=torch.float64)

    def by_quadrature(theta):
        density = -problem.energy(x, number(theta))
        log_z = density.logsumexp(0) + math.log(28 / 4000)
        return torch.stack([problem.energy(number(y), number(theta)) for y in problem.data]).mean() + log_z

    offset = problem.loss(number(0.3)) - by_quadrature(0.3)
    for theta in (-0.8, 0.1, 0.9):
        assert problem.loss(number(theta)) - by_quadrature(theta) == pytest.approx(offset.item(), abs=1e-10)
        d = 1e-4
        difference = (by_quadrature(theta + d) - by_quadrature(theta - d)) / (2 * d)
        assert problem.gradient(number(theta)).item() == pytest.approx(difference.item(), abs=1e-7)
        field = MeanField(problem, 0.1)
        p = (-problem.energy(field.grid, number(theta))).softmax(0)
        at_data = field.pull(number(problem.data), theta).mean()
        assert (at_data - p @ field.pull(field.grid, theta)).item() == pytest.approx(difference.item(), abs=1e-7)
        second = (problem.gradient(number(theta + d)) - problem.gradient(number(theta - d))) / (2 * d)
        assert problem.curvature(theta) == pytest.approx(second.item(), rel=1e-6)
    assert abs(problem.gradient(number(problem.optimum))) < 1e-11 and problem.curvature(problem.optimum) > 0.1


def test_quantiles_are_draws_from_the_law():
    """Moments over equally spaced levels: those of N(θ, 1), of N(0, e^{−θ}), and the mass of the right mode."""
    levels = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    x = LOCATION.quantiles(0.7, levels)
    assert x.mean() == pytest.approx(0.7, abs=1e-5) and x.var() == pytest.approx(1, abs=1e-3)
    assert SCALE.quantiles(0.8, levels).var() == pytest.approx(math.exp(-0.8), rel=1e-3)
    overlap = math.erfc(2 / math.sqrt(2)) / 2
    weight = 1 / (1 + math.exp(-2 * 0.4))
    share = weight * (1 - overlap) + (1 - weight) * overlap
    assert (MODES.quantiles(0.4, levels) > 0).double().mean() == pytest.approx(share, abs=1e-4)


def test_copies_are_runs_of_their_own():
    """Other values of θ in one copy leave the paths of all others as they were; V is a sum over coordinates."""
    starts = number([[0.5, -0.5], [0.2, 0.1], [0.0, 0.3]])
    x = Noise(1).normal((6, 3, 2), dtype=torch.float64)
    path = follow(PROBLEMS, starts, x, 8, Noise(0), 0.2, 0.1)
    other = starts.clone()
    other[1, 1] = -0.9
    moved = follow(PROBLEMS, other, x, 8, Noise(0), 0.2, 0.1)
    same = torch.ones_like(starts, dtype=torch.bool)
    same[1, 1] = False
    torch.testing.assert_close(path[:, same], moved[:, same], rtol=0, atol=1e-12)
    assert (path[1:, 1, 1] - moved[1:, 1, 1]).abs().min() > 0.1
    potential = Copies(PROBLEMS, starts)
    by_hand = sum(p.energy(x[:, i, s], starts[i, s]) for i, p in enumerate(PROBLEMS) for s in range(2))
    torch.testing.assert_close(potential(x), by_hand)
    assert potential.data.shape == (4, 3, 2) and potential.data[:, 2, 1].tolist() == list(MODES.data)


@pytest.mark.parametrize("schedule", [True, False])
def test_second_moments_of_the_location_problem_are_those_of_the_loop(schedule):
    """E ∇ℓ² of every iteration, with three particles, by z-scores over copies; at constant steps too."""
    particles, copies, iterations = 3, 3000, 12
    steps = paper_steps(iterations) if schedule else [(0.3, 0.2)] * iterations
    h, lr = ((lambda k: steps[k][0]), (lambda k: steps[min(k, iterations - 1)][1])) if schedule else (0.3, 0.2)
    start, x = torch.full((1, copies), 0.7, dtype=torch.float64), Noise(1).normal((3, 1, copies), dtype=torch.float64)
    path = follow([LOCATION], start, x, iterations, Noise(0), h, lr)
    squares = gradients([LOCATION], path)[:, 0].square()
    exact = linear.squared_gradients(steps, particles, 0.7)
    assert exact[0] == pytest.approx(0.49)
    z = (squares.mean(1) - exact)[2:] / (squares.std(1) / copies**0.5)[2:]
    assert z.abs().max() < 4
    assert (squares.std(1) / copies**0.5)[-1] < 0.03 * exact[-1]


def test_running_means():
    """Under the paper's schedules, against the closed form: h_k = k^{−1/3}/2, η_k = h_k k^{−1/3}, from k = 1 on."""
    means, K = running_means(20, 8, copies=2000, seed=0), records(20)
    assert K.tolist() == list(range(1, 21))
    steps = [(0.5 * k ** (-1 / 3), 0.5 * k ** (-2 / 3)) for k in range(1, 21)]
    exact = linear.squared_gradients(steps, 8, LOCATION.start)
    for k in (1, 2, 20):
        mean, error = means[k - 1, 0].mean(), means[k - 1, 0].std() / 2000**0.5
        assert abs(mean - exact[:k].mean()) < 4 * error + 1e-12
        assert error < 0.02 * mean
    torch.testing.assert_close(number(steps), number(paper_steps(20)))


def test_the_floor_of_the_location_problem():
    """The recursion's limit, and (η/h)/n to first order; lag of the slow solution, and its series."""
    for h, lr in ((0.2, 0.05), (0.7, 0.3), (0.05, 0.02)):
        end = linear.squared_gradients([(h, lr)] * 1000, 5, 1.0)[-1].item()
        assert linear.floor(h, lr, 5) == pytest.approx(end, rel=1e-9)
    assert linear.floor(1e-4, 1e-7, 5) == pytest.approx(1e-3 / 5, rel=1e-3)
    for ratio in (0.01, 0.1, 0.24):
        assert linear.lag_over(0.2, 0.2 * ratio, 200, 260) == pytest.approx(linear.lag(ratio), rel=1e-2)
        assert linear.lag_over(0.2, 0.2 * ratio, 0, 1) == 0  # particles begin where θ is
    r = 1e-3
    assert linear.lag(r) == pytest.approx(r + 2 * r**2 + 5 * r**3 + 14 * r**4, rel=1e-9)


@pytest.mark.parametrize("h", [0.05, 0.4])
def test_mean_field_in_closed_form(h):
    """Location: ULA's variance, no bias, noise (η/h)/n. Scale: the variance is 1 where λ(1 − hλ/2) = 1, and x² is an
    autoregression with coefficient (1 − hλ)².
    """
    field = MeanField(LOCATION, h)
    assert field.law(field.kernel(0.0)) @ field.grid.square() == pytest.approx(1 / (1 - h / 2), rel=1e-10)
    assert abs(field.bias) < 1e-10
    assert field.floor(1e-6, 7) == pytest.approx(1e-6 / 7, rel=1e-6)

    field, precision = MeanField(SCALE, h), (1 - math.sqrt(1 - 2 * h)) / h
    assert field.end == pytest.approx(math.log(precision), abs=1e-10)
    assert field.bias == pytest.approx((precision - 1) / 2, abs=1e-10)
    rho = (1 - h * precision) ** 2
    variance = precision**2 / 2 * (1 + rho) / (1 - rho)
    kappa = precision**2 / 2 * (1 - h * precision)
    spread = (precision / 2) ** 2 * 0.1 * h * variance / (2 * kappa * 5)
    assert field.floor(0.1, 5) == pytest.approx(field.bias**2 + spread, rel=1e-6)


def test_mean_field_of_the_modes(monkeypatch):
    """The bias is of first order in h, and a finer grid gives the same numbers."""
    from implicit_diffusion.commands.theory import mean_field

    biases = {h: MeanField(MODES, h).bias for h in (0.04, 0.02)}
    assert 1.8 < biases[0.04] / biases[0.02] < 2.2
    field = MeanField(MODES, 0.3)
    floor, bias = field.floor(0.1, 5), field.bias
    mean_field._end.cache_clear()
    monkeypatch.setattr(mean_field, "COARSEST", 0.08)
    assert field.bias == pytest.approx(bias, abs=1e-9) and field.floor(0.1, 5) == pytest.approx(floor, rel=1e-6)
    mean_field._end.cache_clear()


@pytest.mark.slow
def test_loops_end_at_the_predicted_floors():
    """A loop with constant steps on all three problems, floor and bias by z-scores; where h is large so is the bias."""
    run = ConstantSteps(step_size=0.4, ratio=0.1, particles=40, copies=64, measured=150, seed=0)
    measured = settled(run)
    for i, problem in enumerate(PROBLEMS):
        field = MeanField(problem, run.step_size)
        floor, bias = measured["floor"][i], measured["bias"][i]
        assert abs(bias.mean() - field.bias) < 4 * bias.std() / 8
        predicted = field.floor(run.ratio, run.particles)
        assert abs(floor.mean() - predicted) < 4 * floor.std() / 8 + 0.1 * predicted  # to first order in η/h
    assert measured["bias"][1].mean() > 20 * measured["bias"][1].std() / 8
    exact = linear.floor(run.step_size, run.lr, run.particles)
    assert abs(measured["floor"][0].mean() - exact) < 4 * measured["floor"][0].std() / 8


def test_the_recursion_is_the_queue():
    """θ of every iteration, fill included, is the recursion's mean and its response to the noise of each trajectory."""
    problem, copies, batch, iterations = Denoising(4, 0.2), 3, 2, 18
    net = GaussianDenoiser.ornstein_uhlenbeck(torch.full((copies,), denoising.START, dtype=torch.float64), 1.0)
    chain = Chain(net, ou_reverse_sde(problem.num_steps, denoising.HORIZON), (copies,))
    reward = Reward(lambda x: -(x - denoising.TARGET).square().sum(1) / 2)
    sgd = torch.optim.SGD(net.parameters(), lr=problem.lr)
    loop = Queue(chain, reward, sgd, batch=batch, noise=Noise(3))

    def zeta(i):
        x = chain.initial(Noise(3), batch, i)
        for row in range(problem.num_steps):
            x = (1 - problem.h) * x + (2 * problem.h) ** 0.5 * chain.innovation(Noise(3), batch, [i], [row])[0]
        return x.mean(0)

    mean = problem.path(iterations)
    response = problem.path(iterations, problem.optimum, first_noise=1.0) - problem.optimum
    for n in range(iterations):
        expected = mean[n] + sum((response[n - i] * zeta(i) for i in range(n)), number([0.0] * copies))
        torch.testing.assert_close(net.mean.detach(), expected, rtol=0, atol=1e-12)
        loop.step()


def test_variance_and_rate_of_the_recursion():
    """One row: θ is an autoregression with coefficient 1 − p. More rows: the last of the path shrinks by the root."""
    problem = Denoising(1, 0.3)
    noise = problem.lr**2 * problem.gain**2 * problem.variance / 4
    assert problem.settled_variance(4) == pytest.approx(noise / (1 - 0.7**2), rel=1e-9)
    assert problem.rate == pytest.approx(0.7)
    for problem in (Denoising(3, 0.02), Denoising(6, 0.03)):
        errors = problem.path(200) - problem.optimum
        assert (errors[200] / errors[199]).item() == pytest.approx(problem.rate, rel=1e-6)


def test_a_queue_is_what_the_closed_form_says():
    result, path = run_queue(Denoising(3, 0.3), copies=100, longest=150, seed=0)
    assert abs(result.rate - result.rate_exact) < 4 * result.rate_se < 0.1
    assert abs(result.output - result.target) < 4 * result.output_se < 0.03
    assert abs(result.variance - result.variance_exact) < 4 * result.variance_se < 0.2 * result.variance_exact
    assert result.staleness == 4 and result.guaranteed and path.shape[1] == 100


def test_unweighted_particles_lag_and_weighted_do_not(monkeypatch):
    from implicit_diffusion.commands.theory import lag

    monkeypatch.setattr(lag, "PARTICLES", 600)
    ratio = 0.1
    plain = lags(ratio, 16, False, Noise(0))
    weighted = torch.cat([lags(ratio, 1, True, Noise(seed)) for seed in (1, 2)])
    exact = linear.lag_over(lag.STEP_SIZE, ratio * lag.STEP_SIZE, lag.FIRST, lag.LAST)
    assert abs(plain.mean() - exact) < 4 * plain.std() / 4 < 0.1 * exact
    assert abs(weighted.mean()) < 4 * 2 * plain.std() / 2**0.5 < 0.6 * exact  # half of the particles are effective


def test_slopes():
    """Exact power laws; the jackknife against the error that it estimates, where that is known."""
    x = torch.logspace(0, 2, 7, dtype=torch.float64)
    assert log_slope(x, 3 * x**-0.4) == pytest.approx(-0.4)
    ys = number([[1.0], [0.1]]) * (1 + 0.1 * Noise(0).normal((2, 400), dtype=torch.float64))
    fitted = mean_slope(number([1.0, 10.0]), ys)
    m = ys.mean(1)
    relative = ys[1] / m[1] - ys[0] / m[0]
    error = relative.std().item() / 20 / math.log(10)
    assert fitted.value == pytest.approx(math.log10(m[1] / m[0]), abs=1e-12)
    assert (fitted.high - fitted.low) / 2 == pytest.approx(1.96 * error, rel=0.02)


def test_exponents_of_measured_power_laws():
    x = number([1.0, 10.0])
    fitted = power_law_exponent(x, 2 * x**1.5, number([0.02, 0.5]))
    error = math.hypot(0.01, 0.5 / (2 * 10**1.5)) / math.log(10)
    assert fitted.value == pytest.approx(1.5, abs=1e-3)
    assert (fitted.high - fitted.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    x = torch.logspace(-2, 0, 5, dtype=torch.float64)
    buried = power_law_exponent(x, x**2 + number([0.05, -0.05, 0, 0, 0]), number([0.05, 0.05, 1e-3, 1e-3, 1e-3]))
    assert buried.low < 2 < buried.high and buried.high - buried.low < 0.05  # points in their noise do no harm
