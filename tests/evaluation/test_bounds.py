"""The bound J* and its law against Gaussian closed forms, from pretrained and from trained samples."""

import copy
import math

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.evaluation import (
    bound,
    captured,
    captured_by_weights,
    gain,
    memory_of_start,
    possible,
    reweighted,
    sharpest,
)
from implicit_diffusion.evaluation.chains import Evaluation, evaluate, mean_and_error
from implicit_diffusion.noise import Noise
from tests.helpers.oracles import affine_chain, exact_terms, riccati, tilted_bound

BETA = 0.7


@pytest.fixture(scope="module")
def problem():
    chain, reward = affine_chain(6, 2)
    return chain, reward, tilted_bound(chain, reward, BETA)


def trained(chain, reward):
    _, gain, shift = riccati(chain, reward, BETA)
    return chain.replace(denoiser=type(chain.denoiser)(gain, shift), reference=chain.reference)


@pytest.mark.parametrize("control", ["pretrained", "riccati"])
def test_equals_the_closed_form(problem, control):
    chain, reward, (conditional, unconditional) = problem
    chain = chain if control == "pretrained" else trained(chain, reward)
    evaluation = evaluate(chain, reward, Noise(2), starts=20_000, repeats=8, chunk=40_000)
    b, pooled = bound(evaluation, BETA), bound(evaluation, BETA, conditional=False)
    gain = -exact_terms(chain.pretrained(), reward)[0].item() - conditional
    assert b.j_se < 0.03 * gain
    assert abs(b.j - conditional) < 4 * b.j_se
    assert abs(pooled.j - unconditional) < 4 * pooled.j_se
    for each in (b, pooled):
        assert each.j == pytest.approx(-each.reward + BETA * each.path_kl, abs=1e-9)


def test_trained_samples_are_sharper(problem):
    chain, reward, _ = problem
    errors = [
        bound(evaluate(c, reward, Noise(2), starts=2000, repeats=8), BETA) for c in (chain, trained(chain, reward))
    ]
    assert errors[1].effective_samples > errors[0].effective_samples


def test_the_optimum_law_is_the_derivative_of_the_cumulant(problem):
    """E*R = d(J*/β)/d(−1/β) by finite differences of the closed form."""
    chain, reward, _ = problem
    d = 1e-4
    up, down = (tilted_bound(chain, reward, 1 / (1 / BETA + e))[0] * (1 / BETA + e) for e in (d, -d))
    exact = -(up - down) / (2 * d)
    b = bound(evaluate(trained(chain, reward), reward, Noise(4), starts=20_000, repeats=8, chunk=40_000), BETA)
    assert abs(b.reward - exact) < 4 * b.reward_se


def test_errors_of_the_unconditional_bound_cover():
    """Its standard errors against the spread over 200 independent evaluations of a Gaussian reward."""
    draws = torch.randn(200, 500, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    zeros = torch.zeros_like(draws[0])
    bounds = [bound(Evaluation(w, zeros, zeros, w[..., None]), 1.0, conditional=False) for w in draws]
    for name in ("j", "reward", "path_kl"):
        values = torch.tensor([getattr(b, name) for b in bounds])
        errors = torch.tensor([getattr(b, f"{name}_se") for b in bounds])
        assert 0.8 < errors.mean() / values.std() < 1.2


@pytest.mark.parametrize("conditional", [True, False])
def test_the_error_of_the_gain_is_that_of_a_difference(conditional):
    """Against the spread over 300 evaluations; for a weak tilt it is far below that of either mean."""
    draws = torch.randn(300, 100, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    zeros = torch.zeros_like(draws[0])
    gains = torch.tensor([gain(Evaluation(w, zeros, zeros, w[..., None]), 8.0, conditional=conditional) for w in draws])
    values, errors = gains.unbind(1)
    assert 0.85 < errors.mean() / values.std() < 1.15  # the spread itself is known to 4 %
    assert abs(values.mean() - 1 / 8) < 4 * values.std() / 300**0.5
    assert errors.mean() < 0.3 * (100 * 8) ** -0.5


def test_the_possible_gain_is_what_the_captured_share_is_of(problem):
    chain, reward, _ = problem
    before, after = (evaluate(c, reward, Noise(2), starts=500, repeats=8) for c in (chain, trained(chain, reward)))
    most, error = possible(before, after, BETA)
    gained = (before.objective(BETA) - after.objective(BETA)).mean().item()
    assert captured(before, after, BETA)[0] * most == pytest.approx(gained)
    best, source = sharpest(before, after, BETA)
    assert most == pytest.approx(before.objective(BETA).mean().item() - best.j) and 0 < error < most
    assert source == "trained" and best.j == pytest.approx(BETA * best.path_kl - best.reward, abs=1e-9)


def test_differences_of_j_on_one_noise_are_exact_where_the_drift_is_the_optimum():
    """R = σz, which the drift shifts by a = σ/β: J falls by σ²/2β whatever z is, and nothing is left to the bound.

    With the control variate in the first difference, or without it in the second, each would have an error.
    """
    sigma, shift = 1.5, 1.5 / BETA
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kl = torch.full_like(z, shift**2 / 2)
    before = Evaluation(sigma * z, 0 * z, 0 * z, z[..., None])
    after = Evaluation(sigma * (z + shift), kl, kl + shift * z, z[..., None])
    exact = sigma**2 / (2 * BETA)
    for estimate in (possible(before, after, BETA), mean_and_error(before.objective(BETA) - after.objective(BETA))):
        assert estimate == pytest.approx((exact, 0.0), abs=1e-12)
    assert captured(before, after, BETA) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert mean_and_error(after.objective(BETA, control_variate=True))[1] < 1e-12 < mean_and_error(z)[1]
    best, source = sharpest(before, after, BETA)
    assert source == "trained" and best.j == pytest.approx(after.objective(BETA).mean().item())
    assert best.j == pytest.approx(BETA * best.path_kl - best.reward, abs=1e-12)
    assert (best.path_kl, best.path_kl_se) == pytest.approx((shift**2 / 2, 0.0), abs=1e-12)
    law = reweighted(before, after, BETA)
    assert (*law.reward_gain, *law.path_kl) == pytest.approx((sigma * shift, 0.0, shift**2 / 2, 0.0), abs=1e-12)
    assert law.j_fall == pytest.approx((exact, 0.0), abs=1e-12) and law.effective_share == pytest.approx(1)
    assert captured_by_weights(before, after, BETA) == pytest.approx((1.0, 0.0), abs=1e-12)


def test_jackknife_takes_the_bias_away():
    """log E e^w of N(0, 1) is 1/2; with 8 draws the plain log-mean is low by about (e − 1)/16."""
    w = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = (w.logsumexp(1) - torch.tensor(8.0).log()).mean().item()
    zeros = torch.zeros_like(w)
    b = bound(Evaluation(w, zeros, zeros, w[..., None]), 1.0)
    assert abs(-b.j - 0.5) < abs(plain - 0.5) / 3


@pytest.mark.parametrize("scale", [1.0, 40.0, 1e3, 1e6, 1e150])
@pytest.mark.parametrize("repeats", [2, 3, 8])
def test_the_jackknife_is_its_definition_for_any_kl_weight(scale, repeats):
    """M T_M − (M−1)·mean T_{M−1} of the log-mean-exp and of the tilted mean, each left-out set by itself."""
    reward = torch.randn(50, repeats, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward[0] = 0.5  # ties
    w = scale * reward
    log_mean, mean = [], []
    for left_out in range(repeats):
        kept = [i for i in range(repeats) if i != left_out]
        log_mean.append(w[:, kept].logsumexp(1) - math.log(repeats - 1))
        mean.append((w[:, kept].softmax(1) * reward[:, kept]).sum(1))
    whole = w.logsumexp(1) - math.log(repeats), (w.softmax(1) * reward).sum(1)
    value, tilted = (
        repeats * t - (repeats - 1) * torch.stack(parts).mean(0) for t, parts in zip(whole, (log_mean, mean))
    )
    b = bound(Evaluation(reward, 0 * w, 0 * w, reward[..., None]), 1 / scale)
    assert b.j == pytest.approx(-value.mean().item() / scale, rel=1e-9, abs=1e-12)
    assert b.reward == pytest.approx(tilted.mean().item(), rel=1e-9)
    assert math.isfinite(b.path_kl) and b.j_se > 0
    assert b.trusted is False or scale == 1.0


def test_a_bound_of_pretrained_samples_is_never_above_their_j():
    """log-mean-exp ≥ mean, with the jackknife too; so the one that is chosen is below J before, whatever came after."""
    g = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 30.0):
        for repeats in (2, 3, 8):
            before, after = (
                Evaluation(r, 0 * r, k, r[..., None]) for r, k in 3 * torch.randn(2, 2, 5, repeats, generator=g)
            )
            before = Evaluation(before.reward, before.path_kl, before.path_kl, before.samples)
            start = -before.reward.double().mean().item()
            assert bound(before, scale).j <= start and sharpest(before, after, scale)[0].j <= start
            assert possible(before, after, scale)[0] >= 0
            above = Evaluation(before.reward - 50, before.path_kl, before.log_ratio, before.samples)
            assert bound(above, scale).j > start and sharpest(before, above, scale) == (
                bound(before, scale),
                "pretrained",
            )


def test_the_chain_that_tells_the_bound_best_is_chosen(problem):
    """The optimum's samples over the pretrained ones, and these over those of a control that went astray."""
    chain, reward, (conditional, _) = problem
    sizes = {"starts": 4000, "repeats": 8, "chunk": 40_000}
    good = trained(chain, reward)
    astray = chain.replace(denoiser=copy.deepcopy(good.denoiser), reference=chain.reference)
    astray.denoiser.shift.data += 3.0
    before, best, ruined = (evaluate(c, reward, Noise(2), **sizes) for c in (chain.pretrained(), good, astray))
    chosen, source = sharpest(before, best, BETA)
    own = bound(best, BETA)
    assert source == "trained" and (chosen.reward, chosen.effective_samples) == (own.reward, own.effective_samples)
    variate = (best.path_kl - best.log_ratio).mean().item()
    assert chosen.j - own.j == pytest.approx(BETA * variate) and chosen.path_kl - own.path_kl == pytest.approx(variate)
    chosen, source = sharpest(before, ruined, BETA)
    assert source == "pretrained" and chosen == bound(before, BETA)
    assert abs(chosen.j - conditional) < 4 * chosen.j_se < 0.2 < bound(ruined, BETA).j - conditional
    gained = (before.objective(BETA) - ruined.objective(BETA)).mean().item()
    assert captured(before, ruined, BETA)[0] == pytest.approx(gained / possible(before, ruined, BETA)[0])
    single = Evaluation(*(getattr(before, name)[:, :1] for name in ("reward", "path_kl", "log_ratio", "samples")))
    assert sharpest(single, best, BETA)[1] == "trained"  # one trajectory per start has no bound


def test_memory_of_start():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4000, 1, generator=generator, dtype=torch.float64)
    values = 0.5 * start + torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    share, error = memory_of_start(values)
    assert error < 0.02 and abs(share - 0.2) < 4 * error
    share, error = memory_of_start(torch.randn(4000, 4, generator=generator, dtype=torch.float64))
    assert abs(share) < 4 * error


def test_bad_arguments(problem):
    chain, reward, _ = problem
    evaluation = evaluate(chain, reward, Noise(0), starts=4, repeats=1)
    with pytest.raises(InvalidInputError, match="beta"):
        bound(evaluation, 0.0)
    with pytest.raises(InvalidInputError, match="repeats"):
        bound(evaluation, 1.0)
    pairs = [evaluate(chain, reward, Noise(0), starts=n, repeats=2) for n in (4, 5)]
    with pytest.raises(InvalidInputError, match="the same starts, got 4 and 5"):
        captured(*pairs, 1.0)
    with pytest.raises(InvalidInputError, match="reward / beta must be finite"):
        bound(pairs[0], 1e-320)
    for values in (evaluation.reward, pairs[0].reward[:2], torch.ones(4, 2)):
        with pytest.raises(InvalidInputError, match="values must"):
            memory_of_start(values)
    for name in ("starts", "repeats", "chunk"):
        with pytest.raises(InvalidInputError, match=f"{name} must be an integer ≥ 1, got 0"):
            evaluate(chain, reward, Noise(0), **{"starts": 4, name: 0})


def test_rewards_of_another_form_are_no_evaluation(problem):
    """A column, which would broadcast against the log-ratios, is read as its numbers."""
    chain = problem[0]
    column, plain = (evaluate(chain, f, Noise(0), starts=4).reward for f in (lambda x: x[:, :1], lambda x: x[:, 0]))
    assert torch.equal(column, plain)
    for shape, reward in ((r"\(4, 2\)", lambda x: x), (r"\(\)", lambda x: x.mean()), ("float", lambda x: 1.0)):
        with pytest.raises(InvalidInputError, match=f"one number per sample, .* got {shape}"):
            evaluate(chain, reward, Noise(0), starts=4)
    with pytest.raises(NonFiniteError, match="the reward of 2 of 4 samples is NaN"):
        evaluate(chain, lambda x: x[:, 0] / (torch.arange(4) > 1), Noise(0), starts=4)


def test_a_trained_row_without_noise_has_no_bound():
    chain, reward = affine_chain(3, 2, noise=False)
    other = chain.replace(denoiser=copy.deepcopy(chain.denoiser))
    before, after = (evaluate(c, reward, Noise(0), starts=3, repeats=2) for c in (chain.pretrained(), other))
    for call in (lambda: bound(after, 1.0), lambda: captured(before, after, 1.0)):
        with pytest.raises(InvalidInputError, match=r"row of its chain has no noise.*pretrained_rows='noiseless'"):
            call()
    bound(before, 1.0)  # of the pretrained chain there is one
