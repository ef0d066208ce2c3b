"""Diagnostics on processes whose answers are known, and advice that speaks up when it should and only then."""

import math

import pytest
import torch

from implicit_diffusion.loops import Single
from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise, statistics
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.samplers import HMC, MALA, ULA
from tests.helpers.gibbs_loops import F64, along_path, build, path
from tests.helpers.oracles_gibbs import Location


def autoregressive(phi, time, chains, seed=0, means=None):
    """x_{t+1} = φ x_t + √(1 − φ²) ξ, stationary with variance one."""
    g = torch.Generator().manual_seed(seed)
    x, xi = torch.randn(chains, generator=g, dtype=F64), torch.randn(time, chains, generator=g, dtype=F64)
    rows = []
    for t in range(time):
        rows.append(x)
        x = phi * x + math.sqrt(1 - phi**2) * xi[t]
    return torch.stack(rows) + (0 if means is None else means)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.4])
def test_effective_draws_of_an_autoregression(phi):
    """n (1 − φ)/(1 + φ), in chains that share one mean."""
    time = 4000
    values = autoregressive(phi, time, 50)
    assert ess_in_time(values) == pytest.approx(time * (1 - phi) / (1 + phi), rel=0.05)
    assert ess_in_time(values[:-1]) == pytest.approx(ess_in_time(values), rel=0.05)  # an odd number of times
    assert ess_in_time(3 * values + 7) == pytest.approx(ess_in_time(values), rel=1e-9)


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_r_hat(phi):
    """One where the chains agree; √(1 + Var of their means) where they do not; and a drift within chains is seen."""
    values = autoregressive(phi, 5000, 40)
    assert 0.999 < r_hat(values) < 1.01
    means = torch.linspace(-2, 2, 40, dtype=F64)
    apart = r_hat(values + means)
    assert apart == pytest.approx(math.sqrt(1 + means.repeat(2).var()), rel=0.05)
    drift = torch.linspace(-2, 2, 5000, dtype=F64)[:, None]
    assert r_hat(values + drift) > 1.2
    assert r_hat(values[:-1]) == pytest.approx(r_hat(values), abs=1e-3)
    small = torch.tensor([[0.0, 1.0], [1.0, 0.0], [4.0, 2.0], [2.0, 4.0]], dtype=F64)
    # halves (0,1), (1,0), (4,2), (2,4): means ½, ½, 3, 3, variances ½, ½, 2, 2, two values each
    assert r_hat(small) == pytest.approx(math.sqrt((25 / 12 + 1.25 / 2) / 1.25))


def location(theta, n=4000, lr=0.0, kernel=None, **settings):
    potential = Location(torch.tensor([0.0], dtype=F64))
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    objective = Reward(lambda x: -(x[:, 0] - theta).square() / 2)
    optimizer = torch.optim.SGD(potential.parameters(), lr=lr)
    return Single(potential, kernel or ULA(0.1), objective, optimizer, particles=x, noise=Noise(0), **settings)


def test_signal_to_noise_against_its_closed_form():
    """F = E(x − t)²/2 under N(0, 1): Γ → −t, each draw adding x³/2 − t x² − x/2 + t, whose variance is 5/2 + 2t²."""
    n, t = 4000, 2.0
    noise = math.sqrt((2.5 + 2 * t**2) / n)
    found = signal_to_noise(location(t), groups=40)
    assert found == pytest.approx(t / noise, rel=0.4)
    loop = location(t)
    before = loop.state_dict()
    signal_to_noise(loop)
    assert loop.iteration == 0 and loop.model.theta.grad is None
    assert torch.equal(before["weighted_state"]["x"], loop.weighted_state.x)


@pytest.mark.parametrize("truth", [0.0, 0.3, 2.0])
def test_signal_below_the_noise_is_told_apart(truth):
    """With many parameters ‖mean‖² is mostly noise, and what is left of it once that is gone has a spread of √(2/d)."""
    d, n = 400, 64
    potential = GaussianMixture(torch.zeros(1, d, dtype=F64))
    potential.logits.requires_grad_(False)
    target = torch.full((1, d), truth / math.sqrt(n), dtype=F64)  # Γ = −(mean of the data − mean of x): noise √(d/n)
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(8):
        x = torch.randn(n, d, generator=generator, dtype=F64)
        sgd = torch.optim.SGD(potential.parameters(), lr=0.0)
        loop = Single(potential, ULA(0.1), ForwardKL(target), sgd, particles=x, noise=Noise(0))
        squares.append(signal_to_noise(loop) ** 2)
    spread = (math.sqrt(2 / d) + 2 * truth / math.sqrt(d)) / math.sqrt(8)  # of their mean, over 8 loops
    clipped = math.sqrt(2 / d)  # of what falls below zero
    assert abs(sum(squares) / 8 - truth**2) < 4 * 1.3 * spread + clipped


def test_statistics():
    loop = location(1.0)
    found = statistics(loop)
    assert found["mean_norm"] == pytest.approx(loop.weighted_state.x.abs().mean().item())
    assert found["mean_energy"] == pytest.approx((loop.weighted_state.x.square() / 2).mean().item())


def lags(loop, steps):
    return [float(loop.step()["lag"]) for _ in range(steps)]


def lag_of(loop, steps):
    return max(lags(loop, steps))


@pytest.mark.slow
def test_no_lag_where_theta_is_still_or_particles_mix_fast():
    still = path(1)[:1].repeat(200, 1)
    for kernel in (MALA(0.4), ULA(0.05)):
        assert lag_of(along_path(kernel, still, 1000, 0, lag=True), 60) < 0.15
    moving = lags(along_path(HMC(0.5, 6), path(150), 1000, 0, lag=True), 150)
    assert 0 < max(moving) < 0.15  # weights were given up on the way, and did not speak of a lag


def two_modes(lr, weighted=False, lag=False, steps=150):
    """Data have (0.8, 0.2), the start has (0.3, 0.7): more than half of the particles have to go."""
    mixture = GaussianMixture(torch.tensor([[-4.0], [4.0]], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64).log())
    mixture.means.requires_grad_(False)
    data = GaussianMixture(mixture.means.detach(), torch.tensor([0.8, 0.2], dtype=F64).log()).sample(500, Noise(1))
    optimizer = torch.optim.SGD([mixture.logits], lr=lr)
    loop = Single(
        mixture, ULA(0.05), ForwardKL(data), optimizer, particles=500, noise=Noise(0), weighted=weighted, lag=lag
    )
    metrics = [loop.step() for _ in range(steps)]
    return loop, metrics


def test_lag_of_two_modes_whose_weights_are_moved():
    loop, metrics = two_modes(0.2, lag=True)
    assert float(metrics[-1]["lag"]) > 0.3
    assert any("lag behind" in line and "weighted=True" in line for line in advice(loop, metrics[-1]))
    assert loop.particles.log_weights is None  # for information only
    loop, metrics = two_modes(0.2, weighted=True)
    assert not any("lag behind" in line for line in advice(loop, metrics[-1]))
    assert abs(loop.model.weights[0].item() - 0.8) < 0.06


def test_lag_is_for_information_and_changes_nothing():
    with_lag, without = build("ula with lag"), build("ula")
    for _ in range(10):
        with_lag.step(), without.step()
    torch.testing.assert_close(with_lag.weighted_state.x, without.weighted_state.x, rtol=1e-12, atol=1e-12)


def test_advice():
    quiet = location(3.0, lag=True, kernel=MALA(1.0))
    assert advice(quiet, quiet.step()) == []
    for h, word in ((1e-6, "larger step size"), (1e3, "smaller step size")):
        loop = location(3.0, kernel=MALA(h))
        (line,) = advice(loop, loop.step())
        assert "of the proposals are accepted" in line and word in line and "warm_up" in line
    loop = location(0.0, n=64)
    noisy = [line for line in advice(loop, loop.step()) if "mostly noise" in line]
    assert bool(noisy) == (signal_to_noise(loop) < 1)
    apart = autoregressive(0.5, 200, 10, means=torch.arange(10, dtype=F64))
    (line,) = advice(quiet, {}, history=apart)
    assert "R-hat" in line
    weighted = location(3.0, weighted=True)
    (line,) = advice(weighted, {"ess": 20.0})
    assert line.startswith("20 of 4000 particles carry the weight")
