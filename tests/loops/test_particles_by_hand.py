"""Particle loops against densities written down: the increments of weights in both orders, falling step sizes."""

import math

import pytest
import torch

from implicit_diffusion.loops import NestedParticles, Single, Unrolled, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.samplers import HMC, MALA, ULA, power_law
from implicit_diffusion.samplers.weighted_state import WeightedState, resample
from tests.helpers.oracles_gibbs import Location, estimate

F64 = torch.float64
S = 1.5
X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
THETA = torch.tensor([0.4, -0.2], dtype=F64)
KERNELS = {
    "ula": ULA(0.2),
    "ula, falling": ULA(power_law(0.3, 0.6)),
    "mala": MALA(0.3),
    "hmc": HMC(0.4, 2),
}


def sine(x):
    return x.sin().sum(1)


def build(kind, kernel, objective=None, lr=0.5, **settings):
    potential = Location(THETA, S)
    sgd = torch.optim.SGD(potential.parameters(), lr=lr)
    objective = Reward(sine) if objective is None else objective
    return kind(potential, kernel, objective, Update(sgd), particles=X, noise=Noise(0), **settings)


def energy(x, theta):
    return S * (x - theta).square().sum(1) / 2


def log_flow(x, y, theta, h):
    """log e^{−V(x)} q(y|x), with q = N(x − h∇V(x), 2h)."""
    drifted = x - h * S * (x - theta)
    return -energy(x, theta) - (y - drifted).square().sum(1) / (4 * h)


@pytest.mark.parametrize("order", ["paper", "x-first"])
@pytest.mark.parametrize("name", KERNELS)
def test_log_weights_are_ratios_of_densities(name, order):
    """Forwards under the θ of the move, backwards under the θ that the weights are asked under; exact kernels: ΔV."""
    kernel = KERNELS[name]
    loop, log_weights = build(Single, kernel, lr=0.1, weighted=True, order=order), torch.zeros(60, dtype=F64)
    for k in range(4):
        x, theta, h = loop.weighted_state.x.clone(), loop.model.theta.detach().clone(), kernel.step_size_at(k)
        loop.step()
        y, new = loop.weighted_state.x, loop.model.theta.detach()
        assert (new - theta).norm() > 0.02 and (y != x).any()
        if not isinstance(kernel, ULA):
            log_weights = log_weights + energy(y, theta) - energy(y, new)
        elif order == "paper":  # back under the next θ
            log_weights = log_weights + log_flow(y, x, new, h) - log_flow(x, y, theta, h)
        else:  # back under the same θ, which moves on at particles that stay
            log_weights = log_weights + log_flow(y, x, theta, h) - log_flow(x, y, theta, h)
            log_weights = log_weights + energy(y, theta) - energy(y, new)
        held = loop.particles
        torch.testing.assert_close(held.log_weights, log_weights, rtol=1e-10, atol=1e-11)
        growth = log_weights.logsumexp(0) - math.log(60)
        torch.testing.assert_close(held.log_z_growth, growth, rtol=1e-10, atol=1e-11)
    assert log_weights.std() > 0.05  # and no resampling on the way


@pytest.mark.parametrize("begin", ["initial", "last", "data"])
def test_nested_steps_take_the_step_sizes_in_their_order(begin):
    """h_k of the k-th step of the sampler, counted over all updates; from data, those that Γ charges."""
    kernel, inner = ULA(power_law(0.3, 0.7)), 3
    objective = ForwardKL(X + 1) + Reward(sine) if begin == "data" else Reward(sine)
    loop = build(NestedParticles, kernel, objective, inner_steps=inner, begin=begin)
    x, theta = X, THETA
    for outer in range(3):
        x = {"initial": X, "last": x, "data": X + 1}[begin]
        for k in range(outer * inner, (outer + 1) * inner):
            h = 0.3 * (k + 1) ** -0.7
            x = x - h * S * (x - theta) + math.sqrt(2 * h) * loop._draws(k)[0]
        theta = theta - 0.5 * estimate(Location(theta, S), objective, x)
        loop.step()
        torch.testing.assert_close(loop.weighted_state.x, x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(loop.model.theta.data, theta, rtol=1e-11, atol=1e-13)


def test_unrolled_steps_take_the_step_sizes_in_their_order():
    loop, x, theta = build(Unrolled, ULA(power_law(0.3, 0.7)), unrolled_steps=2), X, THETA
    for outer in range(3):
        moving = theta.clone().requires_grad_()
        for k in (2 * outer, 2 * outer + 1):
            h = 0.3 * (k + 1) ** -0.7
            x = x - h * S * (x - moving) + math.sqrt(2 * h) * loop._draws(k)[0]
        (gradient,) = torch.autograd.grad(-sine(x).mean(), moving)
        x, theta = x.detach(), theta - 0.5 * gradient
        loop.step()
        torch.testing.assert_close(loop.weighted_state.x, x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(loop.model.theta.data, theta, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("both", [False, True], ids=["data alone", "with a reward"])
def test_coefficients_reach_the_charges_on_data(both, weighted):
    """Γ of c·E_data V − c·E_p V and a reward, from ∇_θ V = −s(x − θ) by hand; c = 0.7 on particles and on data."""
    data = X[:9] + 1
    objective = 0.7 * ForwardKL(data) + (0.3 * Reward(sine) if both else 0.0 * Reward(sine))
    loop = build(Single, ULA(0.2), objective, lr=1.0, weighted=weighted)
    slopes = -S * (X - THETA)
    gamma = 0.7 * (-S * (data - THETA).mean(0) - slopes.mean(0))
    if both:
        values = sine(X)
        gamma = gamma + 0.3 * ((values - values.mean()) @ slopes) / 59
    loop.step()
    torch.testing.assert_close(loop.model.theta.data, THETA - gamma, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alike", [False, True], ids=["reward", "likelihood"])
@pytest.mark.parametrize("lr", [0.3, 1.5, -1.5])
def test_the_lag_by_hand(lr, alike):
    """By how many deviations weighted and plain means of V and of the charges differ, either way round; weights that
    are exhausted begin anew, and what they told then stays on record until the next time.
    """
    h, objective = 0.2, ForwardKL(X[:9] + 1) if alike else Reward(sine)
    loop = build(Single, ULA(h), objective, lr=abs(lr), lag=True)
    if lr < 0:
        loop.objective = -loop.objective
    log_weights, record, anew = torch.zeros(60, dtype=F64), 0.0, 0
    for _ in range(12):
        x, theta = loop.weighted_state.x.clone(), loop.model.theta.detach().clone()
        w, each = log_weights.softmax(0), [energy(x, theta)] + [sine(x)] * (not alike)
        lags = [((w @ values - values.mean()).abs() / values.std()).item() for values in each]
        assert loop.step()["lag"].item() == pytest.approx(max(*lags, record), rel=1e-9, abs=1e-9)
        if 1 / w.square().sum() < 30:
            log_weights, record, anew = torch.zeros_like(log_weights), max(lags), anew + 1
        y, new = loop.weighted_state.x, loop.model.theta.detach()
        log_weights = log_weights + log_flow(y, x, new, h) - log_flow(x, y, theta, h)
    assert anew > 1 or abs(lr) < 1


class Kept(MALA):
    """Remembers what its last step said of itself."""

    def move(self, step):
        state, self.last = super().move(step)
        return state, self.last


@pytest.mark.parametrize("kind", ["single", "x-first", "nested"])
def test_the_acceptance_reported_is_the_mean_probability(kind):
    """min(1, π(y) q(x|y) / π(x) q(y|x)), averaged over proposals, those that were refused among them."""
    kernel = Kept(0.9)
    settings = {"inner_steps": 1} if kind == "nested" else {"order": "x-first" if kind == "x-first" else "paper"}
    loop = build(NestedParticles if kind == "nested" else Single, kernel, **settings)
    x, h = loop.weighted_state.x.clone(), 0.9
    xi = loop._draws(0)[0]
    y = x - h * S * (x - THETA) + math.sqrt(2 * h) * xi
    expected = (log_flow(y, x, THETA, h) - log_flow(x, y, THETA, h)).exp().clamp(max=1)
    metrics = loop.step()
    torch.testing.assert_close(kernel.last.acceptance, expected, rtol=1e-10, atol=1e-12)
    assert metrics["acceptance"].item() == pytest.approx(expected.mean().item(), rel=1e-12)
    assert (expected - expected.mean()).abs().max() > 0.2 and abs(expected.mean() - expected.median()) > 0.01


def test_momenta_go_with_their_particles():
    """Where weighted particles have some: those of the chosen ones."""
    n, zero = 40, torch.zeros((), dtype=F64)
    x, logs = torch.arange(n, dtype=F64)[:, None], torch.linspace(-8, 0, n, dtype=F64)
    weighted_state = WeightedState(x, 10 * x, logs, zero, x, logs, zero, zero)
    taken, here = resample(weighted_state, Energy(x[:, 0], 2 * x), zero + 0.3)
    assert len(taken.x.unique()) < n / 2
    for found, factor in ((taken.momentum, 10), (here.value[:, None], 1), (here.grad, 2)):
        assert torch.equal(found, factor * taken.x)


@pytest.mark.parametrize("order", ["paper", "x-first"])
def test_particles_that_only_tell_their_lag_are_not_resampled(order):
    loop, x = build(Single, ULA(0.2), lr=1.5, lag=True, order=order), X
    for k in range(12):
        x = x - 0.2 * S * (x - loop.model.theta.detach()) + math.sqrt(0.4) * loop._draws(k)[0]
        loop.step()
        torch.testing.assert_close(loop.weighted_state.x, x, rtol=1e-11, atol=1e-12)
    assert loop.weighted_state.lag > 0  # weights were exhausted on the way
