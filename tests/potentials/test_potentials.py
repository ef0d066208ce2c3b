"""Potentials: values, normalisers, exact draws; and the quadrature that the other tests lean on."""

import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import GaussianMixture, Guided, check_potential, energy_of
from tests.helpers.oracles_gibbs import Banana, Grid, Harmonic, Quartic, line, plane

MEANS = torch.tensor([[-2.0, 0.5], [1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(("grid", "potential"), [(line, Quartic()), (plane, Banana())])
def test_the_quadrature_of_the_tests_is_exact_to_seven_digits(grid, potential):
    spacing = grid.__defaults__[0]
    coarse, fine = grid(spacing), grid(spacing / 2)
    assert abs(coarse.law(potential)[1] - fine.law(potential)[1]) < 1e-9
    for power in (1, 2, 4):
        means = [g.mean(potential, lambda x, p=power: (x**p).sum(1)) for g in (coarse, fine)]
        assert means[0] == pytest.approx(means[1], rel=1e-7)


@pytest.mark.parametrize(("grid", "potential"), [(line, Quartic()), (plane, Banana())])
def test_the_exact_draws_of_the_tests_have_the_moments_of_the_quadrature(grid, potential):
    x = potential.draw(200_000, torch.Generator().manual_seed(0))
    for power in (1, 2, 3):
        values = (x**power).sum(1)
        error = values.std().item() / math.sqrt(len(values))
        assert abs(values.mean().item() - grid().mean(potential, lambda x, p=power: (x**p).sum(1))) < 4 * error


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_mixture_against_its_definition(std):
    mixture = GaussianMixture(MEANS, LOGITS, std)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = sum(
        w * (-(x - c).square().sum(1) / (2 * std**2)).exp() for w, c in zip(LOGITS.softmax(0), MEANS, strict=True)
    )
    torch.testing.assert_close(mixture(x), -density.log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.weights, LOGITS.softmax(0))
    grid = Grid(((-9.0, 9.0), (-10.0, 10.0)), std / 2)
    assert grid.law(mixture)[1] == pytest.approx(mixture.log_z, abs=1e-10)


def test_mixture_draws_are_exact_and_replayable():
    mixture, grid = GaussianMixture(MEANS, LOGITS, 0.7), Grid(((-8.0, 7.0), (-8.0, 8.0)), 0.2)
    x = mixture.sample(100_000, Noise(0), 3)
    assert torch.equal(x, mixture.sample(100_000, Noise(0), 3))
    assert not torch.equal(x, mixture.sample(100_000, Noise(0), 4))
    for f in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 0] * x[:, 1], lambda x: x.square().sum(1)):
        error = f(x).std().item() / math.sqrt(len(x))
        assert abs(f(x).mean().item() - grid.mean(mixture, f)) < 4 * error


def test_energy_is_value_and_gradient_of_every_particle():
    x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # callers may have switched gradients off
        here = energy_of(Banana(), x)
    for i in range(7):
        xi = x[i : i + 1].clone().requires_grad_()
        value = Banana()(xi).sum()
        torch.testing.assert_close(here.value[i], value.detach())
        torch.testing.assert_close(here.grad[i : i + 1], torch.autograd.grad(value, xi)[0])
    assert not here.value.requires_grad and not here.grad.requires_grad and not x.requires_grad


def test_guidance_tilts_the_density():
    base, reward = Quartic(), lambda x: torch.sin(x[:, 0])
    p, _ = line().law(base)
    tilted = p * (0.7 * reward(line().points)).exp()
    torch.testing.assert_close(line().law(Guided(base, reward, 0.7))[0], tilted / tilted.sum())
    with pytest.raises(InvalidInputError, match="weight must be finite"):
        Guided(base, reward, float("nan"))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(())), function

    def forward(self, x):
        return self.scale * self.function(x)


BAD = {
    r"potential must return one number per particle, shape \(2,\) .* got \(2, 3\)": lambda x: x,
    r"potential must return one number per particle, shape \(2,\) .* got \(\)": lambda x: x.sum(),
    "potential must return the particles' dtype and device": lambda x: x.double().sum(1),
    "potential is not differentiable in x": lambda x: x.detach().square().sum(1),
    "potential mixes particles": lambda x: (x - x.mean(0)).square().sum(1),
    "potential gives values that are NaN": lambda x: (x.sum(1) - 1e3).log(),
    "potential gives gradients that are NaN": lambda x: (0 * x.sum(1)).sqrt(),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_potential_is_refused(message):
    with pytest.raises(InvalidInputError, match=message):
        check_potential(Function(BAD[message]), torch.arange(12.0).view(4, 3))
    check_potential(Harmonic(torch.float32), torch.zeros(4, 3, 2))


@pytest.mark.parametrize(
    ("message", "means", "logits", "std"),
    [
        ("means must be a tensor .* with shape .modes, d.", MEANS[0], LOGITS, 1.0),
        ("logits shape", MEANS, LOGITS[:2], 1.0),
        ("std must be positive", MEANS, LOGITS, 0.0),
        ("std must be positive", MEANS, LOGITS, float("inf")),
    ],
)
def test_mixture_arguments(message, means, logits, std):
    from inspect import unwrap

    with pytest.raises(InvalidInputError, match=message):
        unwrap(GaussianMixture.__init__)(GaussianMixture.__new__(GaussianMixture), means, logits, std)


def test_a_mixture_does_not_broadcast_events():
    """On (n, 1) it would be the mixture along x = (x, …, x)."""
    with pytest.raises(InvalidInputError, match=r"means with shape \(2,\) has no density on events of shape \(1,\)"):
        GaussianMixture(MEANS[:, :2])(torch.zeros(3, 1, dtype=MEANS.dtype))


def test_a_weight_of_zero_is_a_logit_of_minus_infinity():
    """What is left is the mixture of the others; without any, or with NaN, there is no law."""
    means = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-2.0, 5.0]]).double()
    x = torch.tensor([[0.3, -1.0], [2.0, 2.0]]).double()
    some = GaussianMixture(means, torch.tensor([0.2, -torch.inf, -1.0]).double(), 0.7)
    assert torch.allclose(
        some(x), GaussianMixture(means[[0, 2]], torch.tensor([0.2, -1.0]).double(), 0.7)(x), rtol=1e-12
    )
    for bad in (torch.nan, torch.inf):
        with pytest.raises(InvalidInputError, match="logits must be finite, or −inf where a weight is zero"):
            GaussianMixture(means, torch.tensor([0.2, bad, -torch.inf]).double())
    with pytest.raises(InvalidInputError, match="−inf alone"):
        GaussianMixture(means, torch.full((3,), -torch.inf).double())
