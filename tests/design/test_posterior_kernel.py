"""The kernel of pairs: what it moves, what it replaces, and the bias of Γ in closed form."""

import math

import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.design import Experiment, InformationGain, PosteriorKernel, lag
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.samplers import State, Underdamped, simulate
from tests.helpers.experiments import Curved, exact_pairs, linear_experiment, linear_gain

NOISE = idf.Noise(0)


def loop_of(experiment, kernel, n, lr=0.0, seed=0, **options):
    parameters = [p for p in experiment.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(parameters, lr=lr)
    objective = InformationGain(experiment)
    return idf.Single(experiment, kernel, objective, sgd, particles=n, noise=idf.Noise(seed), **options)


@pytest.mark.parametrize("kernel", [idf.ULA(0.1), idf.MALA(0.2), idf.HMC(0.3, 2), Underdamped(0.2)])
def test_every_kernel_moves_the_contrast_alone(kernel):
    experiment = linear_experiment(((1.0, 2.0),), (1.0, 1.0))
    x = experiment.sample(50, NOISE)
    *_, (state, _) = simulate(PosteriorKernel(kernel, experiment, renewal=0.0), experiment, x, NOISE, 3)
    before, after = experiment.pairs(x), experiment.pairs(state.x)
    assert torch.equal(before.latent, after.latent) and torch.equal(before.noise, after.noise)
    assert (before.contrast != after.contrast).any(1).float().mean() > 0.7


def test_pairs_are_replaced_at_their_rate_by_new_ones():
    experiment, r, n = linear_experiment(), 0.3, 4000
    kernel = PosteriorKernel(idf.MALA(0.2), experiment, r)
    x = experiment.sample(n, NOISE)
    state, _ = kernel.move(kernel.prepare(experiment, State(x), NOISE.generator(1)))
    before, after = experiment.pairs(x), experiment.pairs(state.x)
    y, y_ = (experiment.outcome(p.latent, p.noise)[:, 0].detach() for p in (before, after))
    new = (y - y_).abs() > 1e-9
    assert abs(new.double().mean() - r) < 4 * math.sqrt(r * (1 - r) / n)
    assert torch.equal(after.contrast[new], after.latent[new]) and (before.noise != after.noise)[new].all()
    assert torch.equal(before.latent[~new], after.contrast[~new])  # exchanged
    z = after.latent[new]
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) and abs(z.var() - 1) < 4 * math.sqrt(2 / len(z))
    torch.testing.assert_close(state.value, experiment(state.x).detach())


def bias_of_ula(experiment, h, r, k):
    """E Γ at iteration k of ULA, of y = ξ z + σ ε, and without any bias.

    At age a the two latents have made a steps together, in turn where they are exchanged (r > 0).
    """
    xi, sigma = experiment.signal.rows.item(), experiment.std
    variance = 1 / (1 + (xi / sigma) ** 2)
    rho = 1 - h / variance
    ages = [r * (1 - r) ** a for a in range(k)] + [(1 - r) ** k]

    def at(age):
        own = age // 2 if r else age  # steps of the contrast
        added = 2 * h * (1 - rho ** (2 * own)) / (1 - rho**2)
        return xi / sigma**2 * (variance * (rho ** (2 * own) - rho**age) + added)

    return -sum(share * at(age) for age, share in enumerate(ages)), -xi * variance / sigma**2


@pytest.mark.parametrize("r", [0.0, 0.2])
def test_the_bias_of_gamma_is_that_of_the_text(r):
    """Young pairs, coarse steps, and renewal, against moments of ULA's recursion; the unbiased value is far away."""
    experiment, h, k, n = linear_experiment(), 0.05, 4, 40_000
    loop = loop_of(experiment, PosteriorKernel(idf.ULA(h), experiment, r), n)
    for _ in range(k):
        loop.step()
    z, z_, epsilon = (part[:, 0] if part.ndim > 1 else part for part in experiment.pairs(loop.particles.x))
    xi, sigma = experiment.signal.rows.item(), experiment.std
    each = (xi * (z_ - z) + sigma * epsilon) * (z_ - z) / sigma**2
    loop.step()
    ours, error = experiment.signal.rows.grad.item(), float(each.std()) / math.sqrt(n)
    biased, unbiased = bias_of_ula(experiment, h, r, k)
    assert ours == pytest.approx(-each.mean().item())
    assert abs(ours - biased) < 4 * error < 0.05 * abs(unbiased)
    assert abs(biased - unbiased) > 8 * error


def test_an_exact_kernel_keeps_contrasts_in_the_posterior():
    """From z′ = z on, at a coarse step, with pairs of every age, of an experiment that is not linear."""
    experiment = Curved()
    loop = loop_of(experiment, PosteriorKernel(idf.MALA(0.5), experiment, 0.1), 4000)
    for _ in range(15):
        metrics = loop.step()
    now = lag(experiment, loop.particles)
    assert abs(now.mean) < 4 * now.error < 0.1 and metrics["acceptance"] < 0.95
    contrast, latent, noise = experiment.pairs(loop.particles.x)
    for numbers in (contrast, latent, noise):
        assert abs(numbers.mean()) < 4 / math.sqrt(len(latent))
        assert abs(numbers.var() - 1) < 4 * math.sqrt(2 / len(latent))
    assert abs((latent[:, 0] * noise).mean()) < 4 / math.sqrt(len(latent))


def test_an_exchange_keeps_the_outcome_and_takes_noise_away():
    """Γ of exact pairs has the variance s⁴(3ξ² + 2σ²)/σ⁴, its average with that of exchanged pairs 2ξ²s⁴/σ⁴."""
    experiment = linear_experiment()
    kernel, x = PosteriorKernel(idf.MALA(0.2), experiment), exact_pairs(experiment, 20_000)
    with torch.no_grad():
        state = kernel._exchanged(State(x, value=experiment(x)))
        torch.testing.assert_close(state.value, experiment(state.x))
    before, after = experiment.pairs(x), experiment.pairs(state.x)
    assert torch.equal(before.contrast, after.latent) and torch.equal(before.latent, after.contrast)
    torch.testing.assert_close(*(experiment.outcome(p.latent, p.noise) for p in (before, after)))

    def gradients(pairs):
        apart = pairs.latent - pairs.contrast
        return (experiment.signal.rows * apart + experiment.std * pairs.noise).detach() * apart / experiment.std**2

    plain, other = gradients(before), gradients(after)
    exact = torch.autograd.grad(linear_gain(experiment), experiment.signal.rows)[0]
    assert abs(other.mean() - exact) < 4 * other.std() / math.sqrt(len(x))
    xi, variance = experiment.signal.rows.item(), experiment.std**2
    s4 = 1 / (1 + xi**2 / variance) ** 2 / variance**2
    for values, exact in ((plain, 3 * xi**2 + 2 * variance), ((plain + other) / 2, 2 * xi**2)):
        apart = (values - values.mean()).square()
        assert abs(apart.mean() - s4 * exact) < 4 * apart.std() / math.sqrt(len(x)) < 0.2 * s4 * exact


def test_the_loop_finds_the_design_of_largest_gain():
    """A measurement of length one says most along the prior's largest deviation."""
    experiment = linear_experiment(((1.0, 0.6),), (0.6, 2.0), 0.5, unit=True)
    first = linear_gain(experiment).item()
    loop = loop_of(experiment, PosteriorKernel(idf.MALA(0.1), experiment), 400, lr=0.3)
    for _ in loop.run(120):
        pass
    best = math.log(1 + (2.0 / 0.5) ** 2) / 2
    assert first < best - 0.3 and best - linear_gain(experiment).item() < 0.01


def test_one_pull_serves_both_and_a_state_continues_to_the_bit():
    def make():
        experiment = linear_experiment()
        return loop_of(experiment, PosteriorKernel(idf.MALA(0.2), experiment, 0.3), 20, lr=0.05)

    whole, first, second = make(), make(), make()
    for _ in range(6):
        metrics = whole.step()
    for _ in range(3):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step()
    assert torch.equal(whole.particles.x, second.particles.x)
    assert torch.equal(whole.model.signal.rows, second.model.signal.rows)
    assert metrics["gradient_evaluations"] == 6 * 2  # of MALA, which Γ shares


def test_loops_with_many_inner_steps_and_warm_up_take_it_as_any_kernel():
    experiment = linear_experiment()
    kernel, x = idf.samplers.warm_up(
        PosteriorKernel(idf.MALA(3.0), experiment), experiment, experiment.sample(200, NOISE), NOISE, steps=40
    )
    assert isinstance(kernel, PosteriorKernel) and 0.1 < kernel.step_size < 3.0
    sgd = torch.optim.SGD(experiment.signal.parameters(), lr=0.1)
    objective = InformationGain(experiment)
    loop = idf.loops.NestedParticles(
        experiment, kernel, objective, sgd, particles=x, noise=NOISE, inner_steps=3, begin="last"
    )
    loop.step()
    assert experiment.signal.rows.grad < 0
    assert idf.loops.distance(loop) == -math.inf


def refused(match, call):
    with pytest.raises(InvalidInputError, match=match):
        call()


class Unnamed(Experiment):
    def outcome(self, z, noise):
        return z[:, 0] + noise

    def log_likelihood(self, y, z):
        return -((y - z[:, 0]) ** 2) / 2


class Doubled(Unnamed):
    def __init__(self):
        super().__init__(linear_experiment().prior, ())

    def noise_of(self, y, z):
        return 2 * (y - z[:, 0])


def test_parts_that_do_not_belong_together_are_refused():
    experiment, other = linear_experiment(), linear_experiment()
    kernel, plain = PosteriorKernel(idf.MALA(0.2), experiment), idf.MALA(0.2)
    sgd = torch.optim.SGD(experiment.signal.parameters(), lr=0.1)

    def single(potential=experiment, kernel=kernel, objective=None, **options):
        given = {"particles": 8, "noise": NOISE} | options
        return idf.Single(potential, kernel, objective or InformationGain(experiment), sgd, **given)

    single()
    sgd = torch.optim.SGD(experiment.signal.parameters(), lr=0.1)
    refused("kernel must leave the outcomes .* PosteriorKernel", lambda: single(kernel=plain))
    refused("must be given the loop's own experiment", lambda: single(objective=InformationGain(other)))
    refused("objective of an experiment must be its InformationGain, got reward", lambda: single(
        objective=InformationGain(experiment) + idf.Reward(lambda x: x[:, 0])))  # fmt: skip
    refused("pairs of an experiment have no weights", lambda: single(weighted=True))
    refused("particles of an experiment are pairs", lambda: single(particles=torch.zeros(8, 2, dtype=torch.float64)))
    mixture = idf.GaussianMixture(torch.zeros(1, 3, dtype=torch.float64))
    sgd = torch.optim.SGD(mixture.parameters(), lr=0.1)
    refused("potential must be the experiment", lambda: single(potential=mixture))


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("renewal must lie in", lambda: PosteriorKernel(idf.MALA(0.1), linear_experiment(), 1.0)),
        ("renewal must lie in", lambda: PosteriorKernel(idf.MALA(0.1), linear_experiment(), -0.1)),
        ("must solve y = outcome", lambda: PosteriorKernel(idf.MALA(0.1), Doubled())),
        ("kernel must be a plain one", lambda: PosteriorKernel(
            PosteriorKernel(idf.MALA(0.1), e := linear_experiment()), e)),
        ("prior must have a method sample", lambda: Unnamed(torch.nn.Linear(1, 1), ())),
        ("prior must return one finite number", lambda: Unnamed(Vectors(), ())),
        ("noise_shape must hold sizes", lambda: Unnamed(linear_experiment().prior, 3)),
        ("std must be positive", lambda: linear_experiment(std=0.0)),
        ("signal fails on latents", lambda: idf.design.GaussianExperiment(
            torch.nn.Linear(3, 1), idf.GaussianMixture(torch.zeros(1, 2)), 1.0)),
        ("signal must return 3 outcomes", lambda: idf.design.GaussianExperiment(
            torch.nn.Flatten(0), idf.GaussianMixture(torch.zeros(1, 2)), 1.0)),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(match, call, as_users_run):
    refused(match, call)


class Vectors(torch.nn.Module):
    def forward(self, z):
        return z

    def sample(self, n, noise):
        return noise.normal((n, 1))
