"""Pools: the pooled posterior, its weights and Γ, against the closed forms of linear Gaussian experiments."""

import math

import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.design import InformationGain, Pool, PooledInformationGain, PosteriorKernel
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import fused_pass
from implicit_diffusion.potentials.energy import energy_of
from implicit_diffusion.samplers import simulate
from tests.helpers.experiments import F64, exact_pools, linear_experiment, linear_gain, posteriors

NOISE = idf.Noise(0)
POOL = Pool(3, 4)


def experiment_of_two(std=0.5):
    return linear_experiment(((1.0, -0.4),), (1.0, 0.6), std)


def loop_of(experiment, pool, renewal, particles, lr=0.0, kernel=None):
    sgd = torch.optim.SGD(experiment.signal.parameters(), lr=lr)
    kernel = PosteriorKernel(kernel or idf.MALA(0.1), experiment, renewal, pool)
    objective = PooledInformationGain(experiment, pool)
    return idf.Single(experiment, kernel, objective, sgd, particles=particles, noise=NOISE)


def test_the_pairs_of_a_pool_have_the_force_and_the_weights_of_normal_laws():
    """∇U = C⁻¹(z′ − mean of means), and w_ij the ratio of N(m_i, C) to N(mean of means, C), normalised."""
    experiment = experiment_of_two()
    x, means = exact_pools(experiment, 2, POOL)
    _, covariance = posteriors(experiment, torch.zeros(1, 1, dtype=x.dtype))
    energy, centre = energy_of(experiment, x), means.mean(1)
    grid = POOL.grid(x)[..., :2]
    pooled = POOL.pooled(energy)
    precision = torch.linalg.inv(covariance)
    torch.testing.assert_close(POOL.grid(pooled.grad)[..., :2], (grid - centre[:, None, None]) @ precision)
    assert not pooled.grad[:, 2:].any()

    def log_normal(mean):
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(grid)

    U = POOL.grid(pooled.value) + log_normal(centre[:, None, None])
    torch.testing.assert_close(U, U[:, :1, :1].expand_as(U))
    w = (log_normal(means[:, :, None]) - log_normal(centre[:, None, None])).softmax(2)
    torch.testing.assert_close(POOL.weights(energy.value), w)
    torch.testing.assert_close(POOL.effective_share(energy.value), 1 / (4 * w.square().sum(2)))


def gamma(experiment, term, x):
    (gradient,) = fused_pass(experiment, [experiment.signal.rows], [(1.0, term)], x, [None]).gradients
    return gradient


def by_outcome(experiment, x, pool):
    """(y − ⟨ξ, z′⟩)(z − z′)/σ² of every pair: ∇_ξ V, by hand, with shape (pools, outcomes, samples, d)."""
    contrast, latent, noise = experiment.pairs(x)
    apart, xi = latent - contrast, experiment.signal.rows.detach()
    return pool.grid((apart @ xi.mT + experiment.std * noise) * apart / experiment.std**2)


def test_gamma_is_the_weighted_mean_and_that_of_the_posteriors():
    """To rounding with the weights of the samples; within its error, E_{z′|y_i} ∇V in closed form for every outcome."""
    experiment, pool = experiment_of_two(1.2), Pool(3, 20_000)
    x, means = exact_pools(experiment, 1, pool)
    each, w = by_outcome(experiment, x, pool)[0], pool.weights(experiment(x).detach())[0]
    of_outcomes = (w[..., None] * each).sum(1)
    ours = gamma(experiment, PooledInformationGain(experiment, pool), x)
    torch.testing.assert_close(ours[0], -of_outcomes.mean(0))

    _, C = posteriors(experiment, torch.zeros(1, 1, dtype=x.dtype))
    xi, latent = experiment.signal.rows.detach()[0], experiment.pairs(x).latent.view(3, -1, 2)[:, 0]
    y = experiment.outcome(*experiment.pairs(x)[1:]).view(3, -1)[:, 0].detach()
    m = means[0]  # E (y − ξz′)(z − z′) = (y − ξm)(z − m) + Cξ
    exact = (((y - m @ xi)[:, None] * (latent - m)) + C @ xi) / experiment.std**2
    influence = pool.samples * w[..., None] * (each - of_outcomes[:, None])
    error = influence.std(1) / math.sqrt(pool.samples)
    assert ((of_outcomes - exact).abs() < 4 * error).all() and (error < 0.1 * exact.norm()).all()
    of_mean = influence.mean(0).std(0) / math.sqrt(pool.samples)
    assert ((ours[0] + exact.mean(0)).abs() < 4 * of_mean).all()


def test_single_outcomes_are_pairs_and_pools_share_out_their_charges():
    """One outcome with M samples has the charges of pairs; the same pool twice has the Γ of one."""
    experiment, single = experiment_of_two(), Pool(1, 5)
    x, _ = exact_pools(experiment, 4, single)
    ours = gamma(experiment, PooledInformationGain(experiment, single), x)
    torch.testing.assert_close(ours, gamma(experiment, InformationGain(experiment), x))
    x, _ = exact_pools(experiment, 1, POOL)
    term = PooledInformationGain(experiment, POOL)
    torch.testing.assert_close(gamma(experiment, term, torch.cat([x, x])), gamma(experiment, term, x))


def test_the_effective_share_of_large_pools_is_that_of_the_text():
    """(2 e^{2 EIG} − 1)^{−1/2}, over outcomes with posterior means N(0, 1 − s²); outcomes and samples at quantiles."""
    experiment, pool = linear_experiment(((1.0,),), (1.0,), 2.0), Pool(300, 500)
    gain = linear_gain(experiment).item()
    s = math.exp(-gain)

    def quantiles(count):
        return torch.special.ndtri((torch.arange(count, dtype=F64) + 0.5) / count)

    y = quantiles(300).repeat_interleave(500)[:, None] * math.sqrt(1 - s**2) / (1 - s**2)  # mean (1 − s²) y
    contrast = s * quantiles(500).repeat(300)[:, None]
    x = experiment.joined(contrast, torch.zeros_like(y), y / experiment.std)
    share = pool.effective_share(experiment(x).detach()).mean().item()
    assert abs(share - (2 * math.exp(2 * gain) - 1) ** -0.5) < 0.005


@pytest.mark.parametrize("kernel", [idf.MALA(0.15), idf.HMC(0.3, 2)])
def test_samples_keep_the_pooled_posterior_and_outcomes_stay(kernel):
    """Draws from it move under a coarse step, and stay draws from it; all outcomes of a pool have the same samples."""
    experiment, pool = experiment_of_two(), Pool(3, 4000)
    x, means = exact_pools(experiment, 1, pool)
    *_, (state, info) = simulate(PosteriorKernel(kernel, experiment, 0.0, pool), experiment, x, NOISE, 4)
    assert torch.equal(state.x[:, 2:], x[:, 2:]) and (state.x[:, :2] != x[:, :2]).any(1).double().mean() > 0.7
    assert info.acceptance.mean() < 0.99
    z = pool.grid(state.x)[0, :, :, :2]
    assert torch.equal(z, z[:1].expand_as(z))
    _, C = posteriors(experiment, torch.zeros(1, 1, dtype=x.dtype))
    apart = z[0] - means[0].mean(0)
    assert (apart.mean(0).abs() < 4 * (C.diagonal() / len(apart)).sqrt()).all()
    found = apart.mT @ apart / len(apart)
    error = ((C.square() + torch.outer(C.diagonal(), C.diagonal())) / len(apart)).sqrt()
    assert ((found - C).abs() < 4 * error).all()


def test_pairs_become_pools_and_pools_stay_what_they_are():
    experiment = experiment_of_two()
    kernel = PosteriorKernel(idf.MALA(0.1), experiment, 0.5, POOL)
    x = experiment.sample(2 * POOL.size, NOISE)
    grid = POOL.grid(kernel.start(x, NOISE.generator()).x)
    first = POOL.grid(x)[:, :, 0]
    assert torch.equal(grid[..., 2:], first[:, :, None, 2:].expand_as(grid[..., 2:]))
    assert torch.equal(grid[1, 2, :, :2], first[1, [0, 1, 2, 0], 2:4])  # at the outcomes' latents, in turn
    moved = exact_pools(experiment, 2, POOL)[0]
    assert torch.equal(kernel.start(moved, NOISE.generator()).x, moved)


@pytest.mark.parametrize(("pool", "r"), [(Pool(400, 2), 0.3), (Pool(20, 2), 1.0), (Pool(1, 3), 0.3)])
def test_outcomes_are_replaced_at_their_rate(pool, r):
    experiment, pools = experiment_of_two(), 1200 // pool.size
    loop = loop_of(experiment, pool, r, pools * pool.size)
    before = pool.grid(loop.particles.x)
    loop.step()
    after = pool.grid(loop.particles.x)
    assert torch.equal(after[..., 2:], after[:, :, :1, 2:].expand_as(after[..., 2:]))
    assert torch.equal(after[..., :2], after[:, :1, :, :2].expand_as(after[..., :2]))
    new = (after[..., 0, 4] != before[..., 0, 4]).double()
    assert abs(new.mean() - r) <= 4 * math.sqrt(r * (1 - r) / new.numel())
    at_latents = (after[..., :2] == after[..., 2:4]).all(3).all(2)
    assert at_latents[new.bool()].all() if pool.outcomes == 1 else not at_latents.any()


def test_the_loop_finds_the_best_direction_and_continues_to_the_bit():
    def make():
        experiment = linear_experiment(((1.0, 0.6),), (0.6, 2.0), 0.8, unit=True)
        return loop_of(experiment, Pool(5, 8), 1.0, 80, lr=0.2, kernel=idf.MALA(0.2))

    whole, first, second = make(), make(), make()
    for _ in range(8):
        whole.step()
    for _ in range(4):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        metrics = second.step()
    assert torch.equal(whole.particles.x, second.particles.x)
    assert torch.equal(whole.model.signal.rows, second.model.signal.rows)
    assert metrics["gradient_evaluations"] == 8 * 3  # of MALA, and Γ's own
    for _ in whole.run(112):
        pass
    best = math.log(1 + (2.0 / 0.8) ** 2) / 2
    assert best - linear_gain(whole.model).item() < 0.02


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("outcomes must be an integer", lambda: Pool(0, 3)),
        ("samples must be an integer", lambda: Pool(2, 1.5)),
        ("pool must be of type Pool", lambda: PooledInformationGain(experiment_of_two(), (2, 3))),
        ("pool must be of type Pool", lambda: PosteriorKernel(idf.ULA(0.1), experiment_of_two(), 0.1, 3)),
        ("renewal must lie in", lambda: PosteriorKernel(idf.ULA(0.1), experiment_of_two(), 1.0, Pool(1, 4))),
        ("a multiple of 12 in each process, got 20", lambda: loop_of(experiment_of_two(), POOL, 0.1, 20)),
    ],
)
def test_wrong_arguments_are_named(match, call, as_users_run):
    with pytest.raises(InvalidInputError, match=match):
        call()


def test_kernel_and_objective_must_have_one_pool():
    experiment = experiment_of_two()
    sgd = torch.optim.SGD(experiment.signal.parameters(), lr=0.1)

    def single(pool, objective):
        kernel = PosteriorKernel(idf.ULA(0.1), experiment, 0.1, pool)
        return idf.Single(experiment, kernel, objective, sgd, particles=12, noise=NOISE)

    for pool, objective in (
        (POOL, InformationGain(experiment)),
        (POOL, PooledInformationGain(experiment, Pool(4, 3))),
        (Pool(), PooledInformationGain(experiment, POOL)),
    ):
        with pytest.raises(InvalidInputError, match="pool must be that of the objective"):
            single(pool, objective)
    single(Pool(1, 4), InformationGain(experiment)).step()
