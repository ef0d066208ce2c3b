"""The OU chains on Gaussian data: exact discrete laws, order of convergence, and one law for all predictions."""

import math

import pytest
import torch

from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.tables.ornstein_uhlenbeck import ou_marginal, ou_probability_flow, ou_reverse_sde

MEAN, VARIANCE, HORIZON = 1.3, 0.4, 3.0
CHAINS = {"sde": ou_reverse_sde, "ode": ou_probability_flow}


def output_law(table, denoiser, mean, variance):
    """Mean and variance of x_N for x_0 ~ N(mean, variance): u = p x + q is affine, and so is every row."""
    q = denoiser(torch.zeros(len(table), 1, dtype=torch.float64), table.t).flatten()
    p = denoiser(table.m[:, None], table.t).flatten() - q
    factors, shifts = table.a + table.b * p, table.b * q
    for factor, shift, s in zip(factors.tolist(), shifts.tolist(), table.s.tolist()):
        mean = factor * mean + shift
        variance = factor**2 * variance + s**2
    return mean, variance


def gaussian(prediction="score"):
    return GaussianDenoiser.ornstein_uhlenbeck(torch.tensor([MEAN], dtype=torch.float64), VARIANCE, prediction)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_law_converges_at_first_order(chain):
    """From the exact p_T the output law tends to the data's, with an error of order h."""
    alpha, sigma = (float(c) for c in ou_marginal(torch.tensor(HORIZON, dtype=torch.float64)))
    steps = torch.tensor([100, 200, 400, 800])
    errors = []
    for n in steps.tolist():
        table = CHAINS[chain](n, HORIZON)
        mean, variance = output_law(table, gaussian(), alpha * MEAN, alpha**2 * VARIANCE + sigma**2)
        errors.append((abs(mean - MEAN), abs(variance - VARIANCE)))
    log_error = torch.tensor(errors, dtype=torch.float64).log()
    log_h = (HORIZON / steps).double().log()
    slopes = ((log_h - log_h.mean())[:, None] * log_error).sum(0) / ((log_h - log_h.mean()) ** 2).sum()
    assert ((slopes - 1).abs() < 0.1).all(), slopes
    assert max(errors[-1]) < 0.02


@pytest.mark.parametrize("chain", CHAINS)
def test_all_predictions_give_one_chain(chain):
    laws = [
        output_law(CHAINS[chain](20, HORIZON, prediction), gaussian(prediction), 0.0, 1.0)
        for prediction in ("score", "epsilon", "sample")
    ]
    for law in laws[1:]:
        assert law == pytest.approx(laws[0], rel=1e-12)


def test_rows_of_the_reverse_sde_are_those_of_the_derivation():
    table = ou_reverse_sde(6, HORIZON)
    h = HORIZON / 6
    torch.testing.assert_close(table.a, torch.full((6,), 1 + h, dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(table.b, torch.full((6,), 2 * h, dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(table.s, torch.full((6,), math.sqrt(2 * h), dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(table.t, HORIZON - h * torch.arange(6, dtype=torch.float64), rtol=1e-15, atol=0)
    assert table.t[-1] == h
    assert table.noiseless() == ()


def test_the_probability_flow_has_no_noise_and_half_the_score():
    sde, ode = ou_reverse_sde(6, HORIZON), ou_probability_flow(6, HORIZON)
    assert torch.equal(ode.a, sde.a)
    assert torch.equal(ode.b, sde.b / 2)
    assert ode.noiseless() == tuple(range(6))


def test_the_marginal_solves_the_sde():
    """α' = −α and (σ²)' = 2 − 2σ², and σ keeps its digits near t = 0."""
    t = torch.tensor([1e-12, 0.1, 1.0, 5.0], dtype=torch.float64)
    alpha, sigma = ou_marginal(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-15, atol=0)
    assert sigma[0].item() == pytest.approx(math.sqrt(2e-12), rel=1e-11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0), "num_steps"),
        ((10, 0.0), "horizon"),
        ((10, math.nan), "horizon"),
        ((10, 1.0, "v_prediction"), "prediction must be 'score', 'epsilon' or 'sample'"),
    ],
)
@pytest.mark.parametrize("chain", CHAINS)
def test_arguments_out_of_range(chain, arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        CHAINS[chain](*arguments)
