"""Denoising score matching: gradients in closed form, minima at the smoothed law, what takes over, states, refusals."""

import copy
import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.loops import ScoreMatching, Single, Update
from implicit_diffusion.loops.starts.score_matching import score_matching
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.potentials import GaussianMixture, Tilted, mlp
from implicit_diffusion.samplers import HMC, annealed

F64 = torch.float64
QUANTILES = torch.special.ndtri((torch.arange(500, dtype=F64) + 0.5) / 500)[:, None]
MEAN, STD = 0.7, 1.3
DATA = MEAN + STD * QUANTILES / QUANTILES.std(correction=0)


class Gaussian(nn.Module):
    """V = s (x − θ)²/2."""

    def __init__(self, theta, s):
        super().__init__()
        self.theta, self.s = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (theta, s))

    def forward(self, x):
        return self.s * (x[:, 0] - self.theta) ** 2 / 2


def slopes(potential, noise_std, data=DATA, count=200):
    """Gradients of the loss on `count` draws of the noise, one row each."""
    parameters, generator = list(potential.parameters()), torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        loss = score_matching(potential, data, torch.randn(data.shape, generator=generator, dtype=F64), noise_std)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def z(rows, truth=0.0):
    return (rows.mean(0) - truth) / (rows.std(0) / math.sqrt(len(rows)))


def test_the_gradient_on_a_gaussian_is_a_closed_form():
    """L = ½ (σ²s²((m − θ)² + v) + (σ²s − 1)²)."""
    theta, s, sigma = 0.2, 0.9, 0.6
    rows, apart = slopes(Gaussian(theta, s), sigma), (MEAN - theta) ** 2 + STD**2
    truth = torch.tensor([-((sigma * s) ** 2) * (MEAN - theta), sigma**2 * (s * apart + sigma**2 * s - 1)], dtype=F64)
    assert (rows.std(0) / math.sqrt(len(rows)) < 0.02 * truth.abs()).all()
    assert (z(rows, truth).abs() < 4).all()


def test_the_minimum_is_the_law_of_data_with_noise():
    sigma = 0.6
    assert (z(slopes(Gaussian(MEAN, 1 / (STD**2 + sigma**2)), sigma)).abs() < 4).all()
    assert z(slopes(Gaussian(MEAN, 1 / STD**2), sigma))[1] > 10


def test_the_minimum_of_a_mixture_is_the_mixture_with_noise():
    """Data are the quantiles of both modes, whose masses are 3/4 and 1/4."""
    means, sigma, std = torch.tensor([[-1.0], [1.2]], dtype=F64), 0.5, 0.4
    data = torch.cat([means[i] + std * QUANTILES / QUANTILES.std(correction=0) for i in (0, 0, 0, 1)])

    def law(std):
        return GaussianMixture(means, torch.tensor([3.0, 1.0], dtype=F64).log(), std)

    assert (z(slopes(law(math.hypot(std, sigma)), sigma, data)).abs() < 4).all()
    assert z(slopes(law(std), sigma, data)).abs().max() > 10


def build(**settings):
    potential = Gaussian(0.0, 1.0)
    update = Update(torch.optim.Adam(potential.parameters(), lr=0.05), ema_decay=0.9)
    return ScoreMatching(potential, DATA, update, **{"noise_std": 0.5, "noise": Noise(0), "batch": 50} | settings)


def test_one_step_by_hand():
    potential = Gaussian(0.0, 1.0)
    loop = ScoreMatching(
        potential, DATA, torch.optim.SGD(potential.parameters(), lr=0.1), noise_std=0.5, noise=Noise(3), batch=20
    )
    y, xi = loop._draws(0)
    x = y + 0.5 * xi
    error = 0.5 * x - xi  # σ s (x − θ) − ξ at θ = 0, s = 1
    metrics = loop.step()
    assert metrics["score_matching"].item() == pytest.approx(error.square().mean().item() / 2)
    assert potential.theta.item() == pytest.approx(0.1 * 0.5 * error.mean().item())
    assert potential.s.item() == pytest.approx(1 - 0.1 * 0.5 * (error * x).mean().item())
    assert metrics["updates"] == 1 and metrics["gradient_evaluations"] == 2


def test_states_continue_bit_for_bit(tmp_path):
    whole, second = build(), build()
    for k in range(6):
        if k == 3:
            save_state(tmp_path, whole.state_dict())
        expected = whole.step()
    second.load_state_dict(load_state(tmp_path))
    for _ in range(3):
        metrics = second.step()
    assert metrics == expected and all(map(torch.equal, whole.parameters, second.parameters))
    with pytest.raises(InvalidInputError, match=r"noise_std was 0.5, is 0.4"):
        build(noise_std=0.4).load_state_dict(whole.state_dict())


def test_weighted_particles_take_over_with_the_right_log_z():
    """Two modes, three quarters of the data on the left; log Z by the weights beside that of a fine grid."""
    noise = Noise(0)
    mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([3.0, 1.0]).log(), 0.3)
    data = mixture.sample(500, noise.stream(0))
    V = Tilted(mlp(1, noise.stream(1), width=8, depth=1), (1,))
    start = ScoreMatching(
        V, data, torch.optim.Adam(V.parameters(), lr=0.03), noise_std=0.3, noise=noise.stream(2), batch=100
    )
    first, *_, last = start.run(60)
    assert last["score_matching"] < 0.8 * first["score_matching"]
    replicas = annealed(V.tempered, HMC(0.15, 3), 800, noise.stream(3), steps=20)
    particles = replicas.particles(V)
    sgd = torch.optim.SGD(V.parameters(), lr=0.02)
    loop = Single(
        V, HMC(0.15, 3), ForwardKL(data), sgd, particles=particles.x, noise=noise.stream(4), weighted=True, min_ess=0.3
    )
    loop.refresh(particles)
    for _ in loop.run(10):
        pass
    axis = torch.arange(-8, 8, 0.01)[:, None]
    exact = (-V(axis).double()).logsumexp(0).item() + math.log(0.01)
    _, error = replicas.log_z(V)
    assert abs(loop.particles.log_z.item() - exact) < 4 * error < 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_std": 0.0}, "noise_std must be positive"),
        ({"noise_std": -1.0}, "noise_std must be positive"),
        ({"batch": 0}, "batch must be"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        build(**settings)


def test_data_that_do_not_fit_are_refused():
    potential = Gaussian(0.0, 1.0)
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=r"data are torch.float32.*potential's parameters torch.float64"):
        ScoreMatching(potential, DATA.float(), sgd, noise_std=0.5, noise=Noise(0))
    with pytest.raises(InvalidInputError, match="data must be finite"):
        ScoreMatching(potential, DATA * math.nan, sgd, noise_std=0.5, noise=Noise(0))


def test_an_overflow_leaves_theta_as_it_was():
    loop = build()
    loop.step()
    before = copy.deepcopy(list(loop.parameters))
    loop.data = loop.data * 1e200
    with pytest.raises(NonFiniteError, match="θ was left as it was"):
        loop.step()
    assert all(map(torch.equal, before, loop.parameters))
