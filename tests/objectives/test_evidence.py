"""−log p(data; θ): its gradient, its value, its algebra, and models with latent variables of one's own."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Gamma, Normal

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.gradients import ConjugateGradients, fused_pass
from implicit_diffusion.gradients.fused import one_pull
from implicit_diffusion.loops import NestedParticles, Single, Unrolled
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Density, Evidence, ForwardKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import Posterior, check_normalised, energy_of
from implicit_diffusion.samplers import MALA, ULA, annealed
from tests.helpers.latent import F64, FactorAnalysis, factor_data, factor_posterior
from tests.helpers.mean_field import problem
from tests.helpers.oracles_gibbs import Banana
from tests.objectives.contract import TermContract


class TestTheContract(TermContract):
    def make(self, dtype=F64):
        return Evidence()

    def law(self, term, weighted):
        """For `one_term`: the particles of other contracts."""
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
        energy = Banana()(x).detach()
        particles = Particles(x, -energy if weighted else None, torch.tensor(0.7, dtype=F64))
        return particles, Density(energy)

    def use(self, term):
        particles, density = self.law(term, weighted=True)
        term.check_stationary(particles, density.energy)
        term.starting_at(particles, density.energy)
        term.first_variation(particles, density)


def sigma_points(d):
    """2d points of equal weight with the moments of N(0, I) up to the third."""
    return math.sqrt(d) * torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64)]), None


def hermite_points(d):
    """Points of different weights with the moments of N(0, I) up to the fifth."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    points = torch.as_tensor(np.array(list(product(nodes, repeat=d))))
    return points, torch.as_tensor(np.array(list(product(np.log(weights), repeat=d)))).sum(1)


def gamma(potential, objective, z, log_weights=None, points=None):
    weigh = None if log_weights is None else lambda here: Particles(z, log_weights)
    terms = objective.stationary
    return fused_pass(potential, list(potential.parameters()), terms, z, points or [None] * len(terms), weigh)


@pytest.mark.parametrize("isotropic", [True, False], ids=["probabilistic PCA", "factor analysis"])
@pytest.mark.parametrize("law", [sigma_points, hermite_points], ids=["uniform", "weighted"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_is_that_of_the_closed_form(law, k, isotropic):
    """V is quadratic in z, so that points with the posterior's mean and covariance are as good as the posterior."""
    potential, data = factor_posterior(m=2, k=k, isotropic=isotropic)
    model = potential.model
    unit, log_weights = law(2 * k)
    z = model.draw(data, unit.view(-1, 2, k))
    fused = gamma(potential, Evidence(), z, log_weights)
    exact = torch.autograd.grad(-model.log_evidence(data), list(model.parameters()))
    for ours, truth in zip(fused.gradients, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused.here.grad, energy_of(potential, z).grad)  # also where one pull serves both
    assert fused.charges.sum().item() == pytest.approx(1)


def test_the_posterior_is_minus_the_log_of_the_joint_density():
    """V + log p(data) is −log of the posterior's density."""
    potential, data = factor_posterior(m=3, k=2)
    mean, factor = potential.model.posterior(data)
    z = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    exact = torch.distributions.MultivariateNormal(mean, scale_tril=factor).log_prob(z).sum(1)
    torch.testing.assert_close(-potential(z), exact + potential.model.log_evidence(data))
    half = potential.tempered(0.5)
    torch.testing.assert_close(half(z), (potential(z) + potential.tempered(0.0)(z)) / 2)
    assert potential.tempered(0.0).log_z == 0.0


def test_annealing_from_the_prior_gives_the_evidence():
    potential, data = factor_posterior(m=2)
    log_z, error = annealed(lambda t: potential.tempered(t * t), MALA(0.15), 400, Noise(0), steps=30).log_z(potential)
    assert abs(log_z - potential.model.log_evidence(data).item()) < 4 * error < 0.25


def test_the_prior_is_sampled_from_the_noise_alone():
    prior = factor_posterior(m=3, k=2)[0].tempered(0.0)
    state = torch.random.get_rng_state()
    z = prior.sample(20_000, Noise(1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(z, prior.sample(20_000, Noise(1))) and not torch.equal(z, prior.sample(20_000, Noise(1), 2))
    assert z.shape == (20_000, 3, 2)
    assert z.mean().abs() < 4 * 120_000**-0.5 and (z.var() - 1).abs() < 4 * (2 / 120_000) ** 0.5


def weighted_loop(seed, n=200, lr=0.02, objective=None, **options):
    """A loop from exact draws of the posterior, with log Z known there."""
    potential, data = factor_posterior(m=4)
    z = potential.model.draw(data, Noise(seed).normal((n, 4, 1), 0, dtype=F64))
    adam = torch.optim.Adam(potential.parameters(), lr=lr)
    loop = Single(
        potential, MALA(0.1), objective or Evidence(), adam, particles=z, noise=Noise(seed).stream(1), **options
    )
    return loop, potential.model, data


@pytest.mark.parametrize("order", ["paper", pytest.param("x-first", marks=pytest.mark.slow)])
def test_the_value_is_tracked_while_the_parameters_move(order):
    """Over independent loops; the evidence rises by 4 nats, and is reported at the θ of each iteration."""
    errors, risen = [], 0.0
    for seed in range(8):
        loop, model, data = weighted_loop(seed, lr=0.04, weighted=True, order=order)
        first = model.log_evidence(data).item()
        exact = torch.tensor(first, dtype=F64)
        loop.refresh(Particles(loop.particles.x, log_z=exact))
        for _ in range(8):
            exact = model.log_evidence(data).item()
            metrics = loop.step()
        errors.append(-float(metrics["neg_log_evidence"]) - exact)
        risen = exact - first
        assert float(metrics["log_z"]) == -float(metrics["neg_log_evidence"])
    error = torch.tensor(errors)
    assert risen > 4
    assert error.mean().abs() < 4 * error.std() / len(error) ** 0.5 < 0.2


def test_without_a_known_start_the_growth_is_reported():
    loop, *_ = weighted_loop(0, weighted=True)
    metrics = loop.step()
    assert "neg_log_evidence" not in metrics and float(metrics["log_z_growth"]) == pytest.approx(0, abs=1e-12)
    loop, *_ = weighted_loop(0)
    assert not {"neg_log_evidence", "log_z", "log_z_growth"} & loop.step().keys()
    loop, *_ = weighted_loop(0, lag=True)
    assert float(loop.step()["lag"]) == pytest.approx(0, abs=1e-9) and float(loop.step()["lag"]) > 0


def test_one_pull_serves_sampler_and_gradient():
    loop, *_ = weighted_loop(0)
    loop.kernel = ULA(0.1)
    assert loop.step()["gradient_evaluations"] == loop.step()["gradient_evaluations"] - 1 == 1
    evidence, likelihood = Evidence(), ForwardKL(torch.zeros(2, 4, 1, dtype=F64))
    assert one_pull((2.0 * evidence).stationary) and one_pull((-evidence).stationary)
    assert one_pull((evidence - likelihood).stationary) and one_pull((evidence + 0.5 * likelihood).stationary)
    assert not one_pull((evidence + likelihood).stationary)  # charges on the particles cancel
    assert not one_pull((evidence + Reward(lambda z: z[:, 0, 0])).stationary)


@pytest.mark.parametrize("log_weights", [None, torch.linspace(-1, 1, 6, dtype=F64)], ids=["uniform", "weighted"])
def test_sums_with_other_objectives(log_weights):
    """With the likelihood of latents, log Z cancels: what remains is E_data V. Elsewhere gradients add up."""
    potential = Banana()
    z = potential.draw(6, torch.Generator().manual_seed(0))
    y = z[:3] + 1.0
    for factor in (1.0, 0.3, -2.0):  # of one pull and of two
        both = gamma(potential, Evidence() + factor * ForwardKL(y), z, log_weights, [None, y])
        complete = torch.autograd.grad(potential(y).mean(), list(potential.parameters()))[0]
        evidence = gamma(potential, Evidence(), z, log_weights)
        expected = factor * complete + (1 - factor) * evidence.gradients[0]
        torch.testing.assert_close(both.gradients[0], expected)
        torch.testing.assert_close(both.here.grad, energy_of(potential, z).grad)
    reward = Reward(lambda z: z[:, 0])
    both = gamma(potential, 2.0 * Evidence() - 0.5 * reward, z, log_weights)
    parts = [gamma(potential, each, z, log_weights).gradients[0] for each in (Evidence(), reward)]
    torch.testing.assert_close(both.gradients[0], 2 * parts[0] - 0.5 * parts[1])


@pytest.mark.slow
def test_processes_that_share_the_particles_find_what_one_finds():
    from tests.helpers.shared_particles import one_term
    from tests.helpers.together import together

    place = "tests.objectives.test_evidence", "TestTheContract"
    whole = one_term(*place)
    for shares in together(2, "tests.helpers.shared_particles:one_term", *place):
        for name, value in whole.items():
            assert (shares[name] is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(shares[name], value, rtol=1e-11, atol=1e-13)


def test_the_nested_loop_and_resumed_runs_take_it():
    loop, *_ = weighted_loop(0, weighted=True)
    other, *_ = weighted_loop(0, weighted=True)
    loop.step(), other.step()
    again, *_ = weighted_loop(0, weighted=True)
    again.load_state_dict(other.state_dict())
    loop.step(), again.step()
    assert torch.equal(loop.model.model.loadings, again.model.model.loadings)
    assert torch.equal(loop.weighted_state.x, again.weighted_state.x)
    assert not any("data" in name for name in loop.model.state_dict())  # a checkpoint holds θ alone
    potential, _ = factor_posterior(m=4)
    nested = NestedParticles(
        potential,
        MALA(0.1),
        Evidence(),
        torch.optim.SGD(potential.parameters(), lr=0.01),
        particles=potential.tempered(0.0).sample(20, Noise(0)),
        noise=Noise(1),
        inner_steps=2,
    )
    assert nested.step()["gradient_evaluations"] == 2 * 2 + 1


def trained(isotropic, m, n, updates, lr):
    data = factor_data(m)
    loadings = torch.tensor([[1.0], [0.3], [-0.2]], dtype=F64)
    model = FactorAnalysis(m, loadings, torch.zeros(1 if isotropic else 3, dtype=F64))
    potential = Posterior(model, data)
    z = potential.tempered(0.0).sample(n, Noise(0))
    sgd = torch.optim.SGD(potential.parameters(), lr=lr / m, momentum=0.9)
    loop = Single(potential, MALA(0.04), Evidence(), sgd, particles=z, noise=Noise(1))
    half = [p.detach().clone() * 0 for p in model.parameters()]
    for k, _ in enumerate(loop.run(updates)):
        if 2 * k >= updates:
            half = [a + 2 * p.detach() / updates for a, p in zip(half, model.parameters(), strict=True)]
    for p, average in zip(model.parameters(), half, strict=True):
        p.data.copy_(average)
    return model, data


def maximum_likelihood(data):
    """Log-likelihood and covariance of probabilistic PCA with one component (Tipping and Bishop, 1999)."""
    values, vectors = torch.linalg.eigh(data.T @ data / len(data))
    noise = values[:-1].mean()
    covariance = noise * torch.eye(len(values), dtype=F64) + (values[-1] - noise) * vectors[:, -1:] @ vectors[:, -1:].T
    return torch.distributions.MultivariateNormal(torch.zeros(len(values), dtype=F64), covariance).log_prob(
        data
    ).sum(), covariance


@pytest.mark.slow
def test_training_finds_the_principal_component():
    model, data = trained(isotropic=True, m=25, n=30, updates=300, lr=0.1)
    best, covariance = maximum_likelihood(data)
    start = FactorAnalysis(25, torch.tensor([[1.0], [0.3], [-0.2]], dtype=F64), torch.zeros(1, dtype=F64))
    with torch.no_grad():
        assert best - model.log_evidence(data) < 0.01 * (best - start.log_evidence(data))
        assert (model.covariance() - covariance).norm() < 0.05 * covariance.norm()


@pytest.mark.slow
@pytest.mark.parametrize("isotropic", [True, False], ids=["probabilistic PCA", "factor analysis"])
def test_training_agrees_with_scikit_learn(isotropic):
    from sklearn.decomposition import PCA
    from sklearn.decomposition import FactorAnalysis as Reference

    model, data = trained(isotropic, m=100, n=200, updates=3000, lr=0.05)
    if isotropic:  # scikit-learn divides by m − 1
        covariance = torch.as_tensor(PCA(n_components=1).fit(data.numpy()).get_covariance()) * 99 / 100
        torch.testing.assert_close(covariance, maximum_likelihood(data)[1])
    else:
        fitted = Reference(n_components=1, tol=1e-10, max_iter=10_000, svd_method="lapack").fit(data.numpy())
        covariance = torch.as_tensor(fitted.get_covariance())
    zero = torch.zeros(3, dtype=F64)
    best = torch.distributions.MultivariateNormal(zero, covariance).log_prob(data).sum()
    with torch.no_grad():
        assert abs(best - model.log_evidence(data)) < 0.05
        assert (model.covariance() - covariance).norm() < 0.02 * covariance.norm()


class Shrunk(nn.Module):
    """z ~ N(0, 1/τ) in two dimensions, x_j ~ N(z, 1); what the methods return can be replaced."""

    def __init__(self, prior=None, likelihood=None):
        super().__init__()
        self.log_precision = nn.Parameter(torch.zeros((), dtype=F64))
        self.made = prior, likelihood

    def prior(self):
        return (
            Normal(torch.zeros(2, dtype=F64), (-self.log_precision / 2).exp()) if self.made[0] is None else self.made[0]
        )

    def likelihood(self, z):
        return Normal(z[:, None].expand(-1, 5, 2), 1.0) if self.made[1] is None else self.made[1](z)


DATA = torch.linspace(-1, 2, 10, dtype=F64).view(5, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Posterior(Shrunk(), DATA[:, :0]), "at least one number"),
        (lambda: Posterior(Shrunk(), DATA.log()), "leave out what was not observed"),
        (lambda: Posterior(Shrunk(), DATA[:4]), r"shape \(2, 5, 2\).*must be \(n, \*data\) = \(2, 4, 2\)"),
        (lambda: Posterior(Shrunk(likelihood=lambda z: Normal(z, 1.0)), DATA[0]), None),
        (lambda: Posterior(Shrunk(likelihood=lambda z: Normal(z[:, 0], 1.0)), DATA[:2, 0]), r"must be .* = \(2, 2\)"),
        (
            lambda: Posterior(Shrunk(likelihood=lambda z: z), DATA),
            r"likelihood\(z\) returns must be of type Distribution",
        ),
        (
            lambda: Posterior(Shrunk(likelihood=lambda z: Bernoulli(logits=z)), DATA[0]),
            "density of the likelihood fails",
        ),
        (lambda: Posterior(Shrunk(likelihood=lambda z: Normal(z, -1.0)), DATA[0]), "model.likelihood fails on latents"),
        (lambda: Posterior(nn.Linear(2, 2), DATA), "needs a method prior"),
        (lambda: Posterior(Shrunk(prior=Normal(0.0, 1.0)), DATA), "at least one dimension"),
        (lambda: Posterior(Shrunk(prior=Gamma(torch.ones(2), 1.0)), DATA), "logarithm of what is positive"),
        (lambda: Posterior(Shrunk(prior=Categorical(torch.ones(2, 2))), DATA), "sum discrete variables out"),
        (lambda: Posterior(Shrunk(prior=torch.zeros(2)), DATA), r"prior\(\) returns must be of type Distribution"),
        (lambda: Posterior(Shrunk(), DATA)(torch.zeros(3, 4, dtype=F64)), r"latents of shape \(2,\), .* \(4,\)"),
        (lambda: Posterior(Shrunk(), DATA).tempered(math.nan), "t must be"),
        (lambda: Evidence(""), "name must be"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    if message is None:
        make()
        return
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_loops_without_a_normaliser_refuse_it():
    field = problem()
    loop = {"particles": torch.zeros(4, 1, dtype=F64), "noise": Noise(0)}
    with pytest.raises(InvalidInputError, match="least value of the inner problem, and ConjugateGradients"):
        Single(field, ULA(0.1), Evidence(), torch.optim.SGD(field.parameters(), lr=0.1), **loop)
    with pytest.raises(InvalidInputError, match="and ConjugateGradients does not"):
        ConjugateGradients(lambda particles, charges: charges).check(Evidence().stationary)
    potential = Banana()
    loop["particles"] = potential.draw(4, torch.Generator())
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="Evidence has no derivative in the particles"):
        Unrolled(potential, ULA(0.1), Evidence(), sgd, unrolled_steps=2, **loop)


def test_a_density_per_datum_is_refused():
    class PerDatum(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, z):
            return self.scale * z.square()

    potential = PerDatum()
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=r"one number per particle.*sum over all dimensions but the first"):
        Single(potential, ULA(0.1), Evidence(), sgd, particles=torch.zeros(4, 3, dtype=F64), noise=Noise(0))


def test_distributions_that_lose_their_parameters_are_named():
    potential = Posterior(Shrunk(), DATA)
    with pytest.raises(NonFiniteError, match="a distribution of Shrunk has parameters that are NaN or infinite"):
        potential(torch.full((3, 2), math.nan, dtype=F64))
    potential.model.made = None, lambda z: Normal(z, -1.0)
    with pytest.raises(NonFiniteError, match="parameters that are out of range: Expected parameter scale"):
        potential(torch.zeros(3, 2, dtype=F64))


def joint(model, complete):
    """−log p(x, z; θ) of `Shrunk` by hand, at draws from it, with or without the prior's normaliser."""

    def simulated(n, noise):
        with torch.no_grad():
            tau = model.log_precision.exp()
            z = noise.normal((n, 2), 0, dtype=F64) / tau.sqrt()
            x = z[:, None] + noise.normal((n, 5, 2), 1, dtype=F64)
        energy = (model.log_precision.exp() * z.square().sum(1) + (x - z[:, None]).square().sum((1, 2))) / 2
        return energy - model.log_precision if complete else energy

    return simulated


def test_a_normaliser_that_is_missing_is_noticed():
    model = Shrunk()
    check_normalised(joint(model, complete=True), model, Noise(0))
    with pytest.raises(InvalidInputError, match=r"∂log_precision must be 0 .* but is -(1.0|0.9).* is missing"):
        check_normalised(joint(model, complete=False), model, Noise(0))


@pytest.mark.parametrize(
    ("simulated", "message"),
    [
        (lambda n, noise: torch.zeros(n, 2), "shape"),
        (lambda n, noise: torch.full((n,), math.nan), "finite"),
        (lambda n, noise: torch.zeros(n), "do not depend on θ"),
        (lambda n, noise: 1 / 0, "simulated fails"),
    ],
)
def test_a_simulation_that_is_none_is_refused(simulated, message):
    with pytest.raises(InvalidInputError, match=message):
        check_normalised(simulated, Shrunk(), Noise(0))
