"""Standard errors against the spread over replicates, and `trusted` against the bias, where J* is known exactly.

Given x_0 of N(0, 1), the reward of the pretrained chain is R = c·x_0 + σ z; a control shifts z by a and another
direction, without reward, by b, so that under it log dP/dP_0 = a z + b w + (a² + b²)/2. Then J* = −σ²/(2β), whatever
a and b are, the optimum is at a = σ/β, b = 0, and J of any control is −σ a + β (a² + b²)/2: all at the mean
c·E x_0 = 0.
"""

import pytest
import torch

from implicit_diffusion.evaluation import (
    bound,
    captured,
    captured_by_weights,
    memory_of_start,
    possible,
    reweighted,
    sharpest,
)
from implicit_diffusion.evaluation.chains import Evaluation, mean_and_error

F64 = torch.float64
SIGMA, BETA, MANY, FEWER = 1.0, 1.0, 200, 60
pytestmark = pytest.mark.usefixtures("as_users_run")  # thousands of calls
BEST = -(SIGMA**2) / (2 * BETA)


def draws(replicates, starts, repeats, *, quadratic=None, memory=1.0, seed=0):
    """Evaluations of the pretrained chain; with `quadratic` q of the reward −q z²/2 + c·x_0 in place of σ z."""
    g = torch.Generator().manual_seed(seed)
    z, w = torch.randn(2, replicates, starts, repeats, generator=g, dtype=F64)
    start = memory * torch.randn(replicates, starts, 1, generator=g, dtype=F64)
    return z, w, start + (SIGMA * z if quadratic is None else -quadratic * z**2 / 2)


def controlled(z, w, reward, a, b):
    """The same noise under a control."""
    log_ratio = a * z + b * w + (a**2 + b**2) / 2
    return Evaluation(reward + SIGMA * a, (log_ratio * 0) + (a**2 + b**2) / 2, log_ratio, reward[..., None])


def spread(estimates):
    """Means of the estimates and of their errors, and the deviation between replicates."""
    values, errors = torch.tensor(estimates, dtype=F64).unbind(1)
    return values.mean().item(), errors.mean().item(), values.std().item()


@pytest.mark.parametrize(
    ("a", "b", "source"), [(0.3, 0.1, "trained"), pytest.param(3.0, 1.0, "pretrained", marks=pytest.mark.slow)]
)
def test_errors_of_share_gain_and_bound_cover(a, b, source):
    """200 replicates know the deviation to 5 %. At a = 0.3 the missed part is most of the error of the share."""
    pairs = [(controlled(*parts, 0.0, 0.0), controlled(*parts, a, b)) for parts in zip(*draws(MANY, 60, 8))]
    assert sharpest(*pairs[0], BETA)[1] == source
    j = -SIGMA * a + BETA * (a**2 + b**2) / 2
    bounds = [bound(pair[source == "trained"], BETA) for pair in pairs]
    for estimates, exact in (
        ([captured(*pair, BETA) for pair in pairs], j / BEST),
        ([possible(*pair, BETA) for pair in pairs], -BEST),
        ([(x.j, x.j_se) for x in bounds], BEST),
        ([(x.reward, x.reward_se) for x in bounds], SIGMA**2 / BETA),
        ([(x.path_kl, x.path_kl_se) for x in bounds], (SIGMA / BETA) ** 2 / 2),
    ):
        mean, error, deviation = spread(estimates)
        assert 0.8 < error / deviation < 1.2
        assert abs(mean - exact) < 1.5 * error + 4 * deviation / MANY**0.5  # what the jackknife leaves


@pytest.mark.parametrize("beta", [1.6 * BETA, pytest.param(BETA, marks=pytest.mark.slow)])
def test_errors_of_the_weighted_law_cover(beta):
    """At the β of the training and at another: differences on the same noise, whatever x_0 contributes to rewards."""
    pairs = [(controlled(*parts, 0.0, 0.0), controlled(*parts, 0.8, 0.3)) for parts in zip(*draws(FEWER, 60, 8))]
    laws = [reweighted(*pair, beta) for pair in pairs]
    for name, exact in (
        ("reward", SIGMA**2 / beta),
        ("reward_gain", SIGMA**2 / beta),
        ("path_kl", (SIGMA / beta) ** 2 / 2),
        ("j", -(SIGMA**2) / (2 * beta)),
        ("j_fall", SIGMA**2 / (2 * beta)),
    ):
        mean, error, deviation = spread([getattr(law, name) for law in laws])
        assert 0.7 < error / deviation < 1.4, name  # so many replicates know the deviation to 9 %
        assert abs(mean - exact) < 0.3 * error + 4 * deviation / FEWER**0.5, name
    assert laws[0].reward_gain.error < 0.6 * laws[0].reward.error


@pytest.mark.parametrize(
    ("a", "b", "source"), [(0.8, 0.3, "trained"), pytest.param(3.0, 1.0, "pretrained", marks=pytest.mark.slow)]
)
def test_the_weighted_chain_captures_all_within_its_error(a, b, source):
    """By trajectories that the bound is not made of: the error is that of two estimates, and is not small."""
    pairs = [(controlled(*parts, 0.0, 0.0), controlled(*parts, a, b)) for parts in zip(*draws(FEWER, 60, 8))]
    assert sharpest(*pairs[0], BETA)[1] == source
    mean, error, deviation = spread([captured_by_weights(*pair, BETA) for pair in pairs])
    assert 0.7 < error / deviation < 1.4 and error > 0.01
    assert source == "pretrained" or abs(mean - 1) < 4 * deviation / FEWER**0.5 + 0.3 * error


def test_starts_are_the_unit():
    """Of a mean, and of J* without the condition: 8 trajectories that share an x_0 are hardly more than one."""
    parts = list(zip(*draws(MANY, 60, 8)))
    for estimates in (
        [mean_and_error(reward) for _, _, reward in parts],
        [(lambda x: (x.j, x.j_se))(bound(controlled(*p, 0.0, 0.0), 3.0, conditional=False)) for p in parts],
    ):
        _, error, deviation = spread(estimates)
        assert 0.8 < error / deviation < 1.2
        assert deviation > 2 * 2**0.5 / (3 * 480**0.5)


def test_the_error_of_the_memory_covers():
    """With two repeats half of the variance is that of the variance within."""
    estimates = [memory_of_start(reward) for _, _, reward in zip(*draws(MANY, 60, 2))]
    mean, error, deviation = spread(estimates)
    assert abs(mean - 0.5) < 4 * deviation / MANY**0.5 + 0.2 * error  # a ratio has a bias
    assert 0.8 < error / deviation < 1.2


def test_four_repeats_whose_bias_is_many_errors_are_not_trusted():
    """R of deviation β: half of 4 repeats are effective, and yet J* is too high by eight standard errors."""
    b = bound(controlled(*(x[0] for x in draws(1, 40_000, 4, memory=0.0)), 0.0, 0.0), BETA)
    assert b.effective_samples > 2.5 and b.j - BEST > 6 * b.j_se
    assert not b.trusted and b.bias > b.j - BEST
    b = bound(controlled(*(x[0] for x in draws(1, 40_000, 2, memory=0.0)), 0.0, 0.0), BETA)
    assert b.effective_samples > 1.5 and not b.trusted and abs(b.bias) > b.j_se


@pytest.mark.parametrize("quadratic", [None, 1.0])
@pytest.mark.parametrize(
    ("starts", "repeats", "beta"), [(64, 4, 1.0), (256, 8, 0.8), (256, 16, 1.0), (1000, 4, 1.0), (1000, 16, 0.7)]
)
def test_what_is_trusted_is_within_its_error(starts, repeats, beta, quadratic):
    """Over 60 replicates: the trusted ones are off by no more than 1.5 standard errors on average, 3 each."""
    exact = -(SIGMA**2) / (2 * beta) if quadratic is None else beta * torch.tensor(1 + quadratic / beta).log() / 2
    parts = zip(*draws(60, starts, repeats, quadratic=quadratic, memory=0.3, seed=1))
    bounds = [bound(controlled(*p, 0.0, 0.0), beta) for p in parts]
    off = torch.tensor([(b.j - exact) / b.j_se for b in bounds if b.trusted])
    if len(off) > 5:
        assert abs(off.mean()) < 1.5 and (off.abs() < 3.5).all()


def test_good_bounds_are_trusted():
    """16 repeats of a weak tilt, and 8 of a chain near its optimum."""
    weak = [bound(controlled(*p, 0.0, 0.0), 2.0) for p in zip(*draws(60, 256, 16))]
    near = [bound(controlled(*p, 0.8, 0.2), BETA) for p in zip(*draws(60, 256, 8))]
    pooled = [bound(controlled(*p, 0.0, 0.0), 2.0, conditional=False) for p in zip(*draws(60, 256, 16))]
    assert all(b.trusted for b in weak + near + pooled)
    assert abs(pooled[0].bias - pooled[0].j_se ** 2 / 4) < 1e-12  # β/2 of the variance of the log-mean


def test_many_repeats_of_few_starts_are_few():
    """x_0 decides nearly all of R: 16 starts are 16 samples, however many trajectories each has."""
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(16, 1, generator=g, dtype=F64) + 0.01 * torch.randn(16, 256, generator=g, dtype=F64)
    b = bound(Evaluation(reward, 0 * reward, 0 * reward, reward[..., None]), BETA, conditional=False)
    assert b.effective_samples < 32 and not b.trusted


@pytest.mark.parametrize(("leaders", "trusted"), [(2, False), (3, True)])
def test_two_of_four_repeats_are_too_few_to_be_trusted_and_three_are_enough(leaders, trusted):
    """Starts that differ by more than few repeats can bias; so many of the four have all the weight of their start."""
    reward = torch.zeros(64, 4, dtype=torch.float64)
    reward[:, :leaders] = 30.0
    reward += 100.0 * torch.arange(64)[:, None]
    b = bound(Evaluation(reward, torch.zeros_like(reward), torch.zeros_like(reward), reward[..., None]), 1.0)
    assert b.effective_samples == pytest.approx(leaders) and abs(b.bias) < b.j_se
    assert b.trusted is trusted
