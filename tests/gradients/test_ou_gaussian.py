"""Denoising a one-dimensional Gaussian: the closed forms of docs/mathematics/ou-gaussian.md against the code.

Data N(m, 1), score −(x − e^{−t}θ) and reward −(x − m)²/2 make the chain x⁺ = (1 − h) x + 2h e^{−t} θ + √(2h) ξ, so that
every gradient is affine in θ and in the noise. The coordinates of an event are independent copies of the problem.
"""

from dataclasses import dataclass

import pytest
import torch

from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.evaluation.chains import evaluate, mean_and_error
from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.ornstein_uhlenbeck import ou_reverse_sde

TARGET, START = 2.0, -0.5


@dataclass(frozen=True)
class OU:
    """The page's constants for N steps to the horizon T."""

    steps: int = 5
    horizon: float = 1.5

    @property
    def h(self):
        return self.horizon / self.steps

    @property
    def g(self):
        """g_j, j = 1..N: what θ on the j-th row from the end adds to x_N."""
        j = torch.arange(1, self.steps + 1, dtype=torch.float64)
        return 2 * self.h * (1 - self.h) ** (j - 1) * torch.exp(-j * self.h)

    @property
    def gain(self):
        """G = Σ g_j."""
        h = torch.tensor(self.h, dtype=torch.float64)
        return (2 * h * (1 - ((1 - h) * torch.exp(-h)) ** self.steps) / (torch.exp(h) - 1 + h)).item()

    @property
    def variance(self):
        """Of x_N."""
        rest = (1 - self.h) ** (2 * self.steps)
        return rest + (1 - rest) / (1 - self.h / 2)

    @property
    def kappa(self):
        """Path KL per (θ − θ_0)²."""
        h = torch.tensor(self.h, dtype=torch.float64)
        return (h * (1 - torch.exp(-2 * h * self.steps)) / (torch.exp(2 * h) - 1)).item()

    @property
    def age(self):
        """τ = Σ (j − 1) g_j / G: mean age that one pass over the rows gives to θ, in iterations."""
        return (torch.arange(self.steps) * self.g).sum().item() / self.gain

    def chain(self, dim=1, theta=START, reference=None):
        net, old = (
            GaussianDenoiser.ornstein_uhlenbeck(torch.full((dim,), mean, dtype=torch.float64), 1.0)
            for mean in (theta, theta if reference is None else reference)
        )
        return Chain(net, ou_reverse_sde(self.steps, self.horizon), (dim,), reference=old.requires_grad_(False))


class Silence(Noise):
    """All zeros: what is affine in its noise becomes its own expectation."""

    def normal(self, shape, *key, device=None, dtype=None):
        return torch.zeros(shape, device=device, dtype=dtype)


def reward(x):
    return -(x - TARGET).square().sum(1) / 2


def zeta(ou, chain, noise, batch, index):
    """Batch mean of what the noise adds to x_N, with shape (dim,)."""
    x = chain.initial(noise, batch, index)
    for row in range(ou.steps):
        x = (1 - ou.h) * x + (2 * ou.h) ** 0.5 * chain.innovation(noise, batch, [index], [row])[0]
    return x.mean(0)


def gradient(chain, objective, noise, batch, index=0):
    chain.denoiser.mean.grad = None
    values = Adjoint()(chain, objective, noise, batch, index)
    return chain.denoiser.mean.grad.clone(), values


@pytest.mark.parametrize("ou", [OU(), OU(1, 0.7), OU(40, 3.0), OU(3, 3.0)], ids=repr)
def test_constants(ou):
    assert ou.g.sum().item() == pytest.approx(ou.gain, abs=1e-14)
    j = torch.arange(1, ou.steps + 1, dtype=torch.float64)
    assert ou.h * torch.exp(-2 * ou.h * j).sum().item() == pytest.approx(ou.kappa, abs=1e-14)
    noise = 2 * ou.h * ((1 - ou.h) ** (2 * (j - 1))).sum().item()
    assert (1 - ou.h) ** (2 * ou.steps) + noise == pytest.approx(ou.variance, abs=1e-14)


def test_constants_in_the_limit():
    """G → 1 − e^{−2T} with relative error −h/4, the variance → 1 with error h/2."""
    ou = OU(4000, 1.5)
    limit = 1 - torch.exp(torch.tensor(-3.0, dtype=torch.float64)).item()
    q = ((1 - ou.h) ** ou.steps) * 2.718281828459045**-1.5
    assert ou.gain / (1 - q) == pytest.approx(1 - ou.h / 4, abs=ou.h**2)
    assert ou.gain == pytest.approx(limit, abs=ou.h)
    assert ou.variance == pytest.approx(1 + ou.h / 2 * (1 - (1 - ou.h) ** (2 * ou.steps)), abs=ou.h**2)
    assert ou.kappa == pytest.approx(limit / 2, abs=ou.h)


def test_output_law():
    ou, dim = OU(), 20_000
    chain = ou.chain(dim)
    x = chain.sample(Noise(0), 1)[0]
    exact = ou.gain * START + zeta(ou, chain, Noise(0), 1, 0)
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-12)
    assert abs(x.mean() - ou.gain * START) < 4 * (ou.variance / dim) ** 0.5
    assert abs(x.var() / ou.variance - 1) < 4 * (2 / dim) ** 0.5 < 0.05


def test_gradient():
    """Γ = G (mean x_N − m) + 2βκ (θ − θ_0): exact given the noise, G (Gθ − m) + 2βκ (θ − θ_0) in expectation."""
    ou, dim, beta = OU(), 20_000, 0.3
    chain = ou.chain(dim, theta=0.4, reference=START)
    ours, values = gradient(chain, Reward(reward) + beta * PathKL(), Noise(1), 3)
    pull = 2 * beta * ou.kappa * (0.4 - START)
    exact = ou.gain * (ou.gain * 0.4 + zeta(ou, chain, Noise(1), 3, 0) - TARGET) + pull
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    assert values["path_kl"].item() == pytest.approx(dim * ou.kappa * (0.4 - START) ** 2, rel=1e-12)
    expected = ou.gain * (ou.gain * 0.4 - TARGET) + pull
    error = ou.gain * (ou.variance / 3 / dim) ** 0.5
    assert error < 0.01 * abs(expected)
    assert abs(ours.mean() - expected) < 4 * error


def test_path_kl_is_the_same_on_every_path_and_bounds_that_of_the_outputs():
    ou = OU()
    chain = ou.chain(1, theta=0.4, reference=START)
    result = evaluate(chain, reward, Noise(2), starts=20_000, chunk=20_000)
    kl = ou.kappa * (0.4 - START) ** 2
    assert (result.path_kl - kl).abs().max() < 1e-12
    mean, error = mean_and_error(result.log_ratio)
    assert abs(mean - kl) < 4 * error
    assert (result.log_ratio.var() / (2 * kl) - 1).abs() < 0.05  # log-ratios of Gaussians: variance is twice the mean
    outputs = (ou.gain * (0.4 - START)) ** 2 / (2 * ou.variance)
    assert outputs < kl


def delayed_recursion(ou, noises, lr, iterations, theta, stride=1):
    """θ^{(n)} of the queue from its closed form, contribution by contribution; `noises[i]` is trajectory i's ζ."""
    g, flight = ou.g.tolist(), -(-ou.steps // stride)
    history, misses = [theta], []
    for n in range(iterations):
        i = n - (flight - 1)  # the trajectory that arrives now
        if i >= 0:
            output = sum(g[ou.steps - 1 - row] * history[i + row // stride] for row in range(ou.steps))
            misses.append(output + noises[i] - TARGET)
        pulls = ((g[j - 1], i - (j - 1) // stride) for j in range(1, ou.steps + 1))
        history.append(history[-1] - lr * sum(weight * misses[born] for weight, born in pulls if born >= 0))
    return history


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_queue_is_the_delayed_recursion(stride):
    """θ of every iteration, fill included, to rounding."""
    ou, lr, iterations, batch = OU(), 0.2, 25, 2
    chain = ou.chain(3)
    loop = Queue(
        chain,
        Reward(reward),
        torch.optim.SGD(chain.denoiser.parameters(), lr=lr),
        batch=batch,
        noise=Noise(3),
        stride=stride,
    )
    noises = [zeta(ou, chain, Noise(3), batch, i) for i in range(iterations)]
    expected = delayed_recursion(ou, noises, lr, iterations, chain.denoiser.mean.detach().clone(), stride)
    for n in range(iterations):
        torch.testing.assert_close(chain.denoiser.mean.detach(), expected[n], rtol=0, atol=1e-11)
        loop.step()


def mean_run(kind, ou, lr, iterations):
    """E θ^{(n)}, by running the loop on silence."""
    chain = ou.chain()
    loop = kind(chain, Reward(reward), torch.optim.SGD(chain.denoiser.parameters(), lr=lr), batch=1, noise=Silence(0))
    thetas = [chain.denoiser.mean.item()]
    for _ in range(iterations):
        loop.step()
        thetas.append(chain.denoiser.mean.item())
    return torch.tensor(thetas, dtype=torch.float64)


def test_staleness_bias():
    """Γ_n − ∇ℓ(θ_n) = Σ_d c_d (θ_{n−d} − θ_n), c = g * g, which is 2τηG² ∇ℓ(θ_n) to first order in η."""
    ou = OU()
    c = torch.nn.functional.conv1d(ou.g.view(1, 1, -1), ou.g.flip(0).view(1, 1, -1), padding=ou.steps - 1).flatten()
    excess = []
    for lr in (0.02, 0.01, 0.005):
        n = 40
        thetas = mean_run(Queue, ou, lr, n + 1)
        gamma = (thetas[n] - thetas[n + 1]) / lr
        exact = ou.gain * (ou.gain * thetas[n] - TARGET)
        lag = (c * (thetas[n - len(c) + 1 : n + 1].flip(0) - thetas[n])).sum()
        torch.testing.assert_close(gamma - exact, lag, rtol=0, atol=1e-11)
        excess.append(((gamma / exact - 1) / (2 * ou.age * lr * ou.gain**2)).item())
    errors = [abs(e - 1) for e in excess]
    assert errors[2] < 0.1 and 1.8 < errors[0] / errors[1] < 2.4 and 1.8 < errors[1] / errors[2] < 2.4


def largest_root(ou, p):
    """Growth per iteration of the slowest mode of the queue's mean error, at p = ηG²."""
    c = torch.nn.functional.conv1d(ou.g.view(1, 1, -1), ou.g.flip(0).view(1, 1, -1), padding=ou.steps - 1).flatten()
    companion = torch.diag(torch.ones(len(c) - 1, dtype=torch.float64), -1)
    companion[0] = -p / ou.gain**2 * c
    companion[0, 0] += 1
    return torch.linalg.eigvals(companion).abs().max().item()


@pytest.mark.parametrize("ou", [OU(), OU(2, 1.0), OU(50, 3.0)], ids=repr)
def test_sufficient_step_is_stable(ou):
    lag = 2 * ou.age
    p = 2 / (1 + (1 + 4 * lag**2) ** 0.5)  # the root of (2τp)² + p = 1
    assert p + (lag * p) ** 2 == pytest.approx(1)
    assert all(largest_root(ou, f * p) < 1 for f in (0.1, 0.5, 1.0))


@pytest.mark.slow
def test_convergence_to_the_target_mean():
    """Queue and nested both end at θ* = m/G, where E x_N = m, at the rates of their slowest roots."""
    ou, p = OU(), 0.1
    assert p + (2 * ou.age * p) ** 2 < 1
    queue, nested = (mean_run(kind, ou, p / ou.gain**2, 80) - TARGET / ou.gain for kind in (Queue, Nested))
    assert abs(queue[-1]) < 1e-3 * abs(queue[0]) and abs(nested[-1]) < 1e-3 * abs(nested[0])
    assert (nested[60] / nested[59]).item() == pytest.approx(1 - p, rel=1e-9)
    assert (queue[60] / queue[59]).item() == pytest.approx(largest_root(ou, p), rel=1e-4)
    long, p = OU(10, 1.5), 1.9  # too long a queue for a step with which the nested loop would converge
    assert largest_root(long, p) > 1.05
    diverging = mean_run(Queue, long, p / long.gain**2, 60) - TARGET / long.gain
    assert diverging[-10:].abs().max() > 5 * abs(diverging[0])


def test_variance_around_the_optimum():
    """θ after many iterations: mean from silence, variance from the recursion's impulse response, by z-scores."""
    ou, dim, batch, iterations = OU(), 4000, 2, 50
    lr = 0.15 / ou.gain**2
    chain = ou.chain(dim)
    loop = Queue(
        chain, Reward(reward), torch.optim.SGD(chain.denoiser.parameters(), lr=lr), batch=batch, noise=Noise(4)
    )
    for _ in range(iterations):
        loop.step()
    theta = chain.denoiser.mean.detach()
    mean = mean_run(Queue, ou, lr, iterations)[-1]
    impulses = torch.eye(iterations, dtype=torch.float64)  # one coordinate per trajectory's ζ
    start = torch.zeros(iterations, dtype=torch.float64)
    offset = delayed_recursion(ou, torch.zeros_like(impulses), lr, iterations, start)[-1]
    response = delayed_recursion(ou, impulses, lr, iterations, start)[-1] - offset
    variance = response.square().sum() * ou.variance / batch
    assert abs(theta.mean() - mean) < 4 * (variance / dim) ** 0.5
    assert abs(theta.var() / variance - 1) < 4 * (2 / dim) ** 0.5 < 0.1
