"""The mean free energy of pairs is the expected information gain, and its gradient needs no normaliser."""

import math

import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.design import Experiment, InformationGain, Pairs, lag
from implicit_diffusion.gradients import fused_pass
from tests.helpers.experiments import (
    F64,
    Curved,
    curved_gain,
    exact_pairs,
    linear_experiment,
    linear_gain,
)


def on_grid(experiment, points=81):
    """V at (z′, z, ε) on a grid, with the log-weights of (z, ε), and the spacing of z′."""
    z, epsilon = torch.linspace(-6, 6, points, dtype=F64), torch.linspace(-6, 6, points, dtype=F64)
    contrasts = torch.linspace(-6, 6, 161, dtype=F64)
    x = torch.cartesian_prod(z, epsilon, contrasts)[:, [2, 0, 1]]
    energy = experiment(x).view(points * points, len(contrasts))
    weights = torch.outer((-(z**2) / 2).softmax(0), (-(epsilon**2) / 2).softmax(0)).flatten()
    return energy + math.log(2 * math.pi) / 2, weights, float(contrasts[1] - contrasts[0])


def test_the_mean_free_energy_is_the_information_gain():
    """By quadrature, of an experiment that is neither linear nor of constant noise, against another quadrature."""
    design = (0.8, 0.5)
    experiment = Curved(design)
    energy, weights, spacing = on_grid(experiment)
    gain = weights @ -((-energy).logsumexp(1) + math.log(spacing))
    assert abs(gain.item() - curved_gain(design)) < 1e-5

    mean_of_gradient = weights @ ((-energy).softmax(1).detach() * energy).sum(1)
    ours = torch.autograd.grad(mean_of_gradient, experiment.design)[0]
    step = 1e-4
    for i in range(2):
        up, down = ([d + sign * step * (i == j) for j, d in enumerate(design)] for sign in (1, -1))
        assert abs(ours[i].item() - (curved_gain(up) - curved_gain(down)) / (2 * step)) < 1e-5


def gamma(experiment, x):
    """Γ of −EIG at pairs, and the standard error of each number, from the pairs' own gradients."""
    term = InformationGain(experiment)
    parameters = [p for p in experiment.parameters() if p.requires_grad]
    points = [term.draw(torch.Generator())]
    fused = fused_pass(experiment, parameters, [(1.0, term)], x, points)

    def one(values, pair):
        named = dict(zip(names, values, strict=True))
        return -torch.func.functional_call(experiment, named, (pair[None],))[0]

    names = [name for name, p in experiment.named_parameters() if p.requires_grad]
    each = torch.func.vmap(torch.func.grad(one), (None, 0))(tuple(parameters), x)
    return [(g, e.mean(0), e.std(0) / math.sqrt(len(x))) for g, e in zip(fused.gradients, each, strict=True)]


def test_gamma_is_exact_where_all_is_linear():
    """Two measurements of three latents: unbiased on independent contrasts, and the mean of the pairs' gradients."""
    experiment = linear_experiment(((1.0, -0.4, 0.3), (0.2, 0.7, -0.5)), (1.0, 0.6, 1.5), 0.5)
    ((ours, mean, error),) = gamma(experiment, exact_pairs(experiment, 60_000))
    exact = -torch.autograd.grad(linear_gain(experiment), experiment.signal.rows)[0]
    torch.testing.assert_close(ours, mean)
    assert ((ours - exact).abs() < 4 * error).all()
    assert (4 * error < 0.05).all() and exact.abs().amax() > 0.4


def test_a_pair_that_begins_as_one_has_no_gradient():
    experiment = linear_experiment()
    ((ours, _, _),) = gamma(experiment, experiment.sample(20, idf.Noise(0)))
    assert ours.abs().max() < 1e-12


def test_the_surprise_of_a_gaussian_experiment_is_that_of_its_likelihoods():
    """In closed form against the difference of two log-likelihoods, with its gradients; images as outcomes too."""
    for experiment in (linear_experiment(((1.0, -0.4), (0.2, 0.7), (0.3, 0.1)), (1.0, 0.6), 0.5), images()):
        x = experiment.sample(5, idf.Noise(0)) + idf.Noise(1).normal((5, len(experiment.sample(1, idf.Noise(0))[0])))
        x.requires_grad_()
        pulls = []
        for surprise in (experiment.surprise(x), Experiment.surprise(experiment, x)):
            inputs = [x, *(p for p in experiment.signal.parameters() if p.requires_grad)]
            pulls.append((surprise, *torch.autograd.grad(surprise.square().sum(), inputs)))
        for ours, reference in zip(*pulls, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-3)


def test_lag_is_zero_on_exact_contrasts_and_positive_behind_the_design():
    experiment = linear_experiment()
    particles = idf.Particles(exact_pairs(experiment, 20_000))
    now = lag(experiment, particles)
    experiment.signal.rows.data += 1.0
    later = lag(experiment, particles)
    assert abs(now.mean) < 4 * now.error < 0.05
    assert later.mean > 10 * later.error


def test_pairs_are_told_apart_and_only_the_contrast_has_a_gradient():
    experiment = linear_experiment(((1.0, 2.0),), (1.0, 1.0))
    x = torch.arange(10, dtype=F64).view(2, 5).requires_grad_()
    contrast, latent, noise = experiment.pairs(x)
    assert (contrast[0].tolist(), latent[0].tolist(), noise[0].tolist()) == ([0, 1], [2, 3], [4])
    assert isinstance(experiment.pairs(x), Pairs)
    (grad,) = torch.autograd.grad(experiment(x).sum(), x)
    assert (grad[:, :2] != 0).all() and (grad[:, 2:] == 0).all()


def images():
    class Images(torch.nn.Module):
        def forward(self, z):
            return z.square().flatten(1).sum(1) / 2

        def sample(self, n, noise):
            return noise.normal((n, 1, 2, 2))

    return idf.design.GaussianExperiment(torch.nn.Conv2d(1, 3, 2, padding=1), Images(), 0.5)


def test_latents_and_outcomes_may_have_any_shape():
    experiment = images()
    assert experiment.noise_shape == (3, 3, 3) and experiment.event_shape == (1, 2, 2)
    x = experiment.sample(4, idf.Noise(0))
    assert x.shape == (4, 35) and experiment(x).shape == (4,)


def test_the_prior_is_kept_as_it_is():
    prior = idf.GaussianMixture(torch.zeros(1, 2))
    experiment = idf.design.GaussianExperiment(torch.nn.Linear(2, 1), prior, 1.0)
    assert not any(p.requires_grad for p in experiment.prior.parameters())
    assert prior.means.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_moves_with_its_dtype(dtype):
    prior = idf.GaussianMixture(torch.zeros(1, 2, dtype=dtype))
    experiment = idf.design.GaussianExperiment(torch.nn.Linear(2, 1, dtype=dtype), prior, 1.0)
    kernel = idf.design.PosteriorKernel(idf.MALA(0.2), experiment)
    sgd = torch.optim.SGD(experiment.signal.parameters(), lr=0.1)
    loop = idf.Single(experiment, kernel, InformationGain(experiment), sgd, particles=8, noise=idf.Noise(0))
    loop.step()
    assert loop.particles.x.dtype == dtype
