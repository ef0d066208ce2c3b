"""Path KL and drift penalty against exact Gaussian values."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import evaluate, mean_and_error
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, PathKL, Reward
from implicit_diffusion.tables.table import ChainTable
from tests.gradients.test_adjoint import perturb
from tests.helpers.oracles import affine_chain, exact_terms


def test_path_kl_is_the_exact_gaussian_kl_in_expectation():
    chain, reward = affine_chain(5, 2, pretrained_rows=(4,))
    perturb(chain.denoiser, 0.15)
    result = evaluate(chain, reward, Noise(0), starts=200_000, chunk=50_000)
    r, kl, _ = (v.item() for v in exact_terms(chain, reward))
    for values, exact in ((result.reward, r), (result.path_kl, kl), (result.log_ratio, kl)):
        mean, error = mean_and_error(values)
        assert error < 0.01 * max(abs(exact), 0.5)
        assert abs(mean - exact) < 4 * error
    weights, error = mean_and_error((-result.log_ratio).exp())  # E_θ dP_0/dP_θ = 1
    assert abs(weights - 1) < 4 * error


def test_path_kl_of_one_row_is_the_kl_of_two_gaussians():
    """With one row, KL(N(μ_θ, s²) ‖ N(μ_0, s²)) given x_0 by torch.distributions."""
    chain, _ = affine_chain(1, 3)
    perturb(chain.denoiser, 0.3)
    x = chain.initial(Noise(1), 4)[None]
    transition = chain.transition(x, [0], reference=True)
    b, s = chain.table.b[0], chain.table.s[0]
    mean_0 = transition.mean + b * (transition.u0 - transition.u)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(transition.mean, s), torch.distributions.Normal(mean_0, s)
    ).sum(-1)
    torch.testing.assert_close(PathKL().cost(transition), kl)
    torch.testing.assert_close(DriftPenalty().cost(transition), kl * s**2 / chain.table.h[0])


def test_rows_without_noise_are_refused_with_three_ways_out():
    chain, _ = affine_chain(4)
    s = chain.table.s.clone()
    s[3] = 1e-10
    rows = ChainTable(chain.table.a, chain.table.b, s, chain.table.m, chain.table.t, chain.table.h, name="DDPM")
    with pytest.raises(InvalidInputError, match=r"row 3 .*reverse SDE.*pretrained_rows='noiseless'.*DriftPenalty"):
        PathKL().check(rows, (0, 1, 2, 3))
    PathKL().check(rows, (0, 1, 2))
    DriftPenalty().check(rows, (0, 1, 2, 3))


def test_objectives_compose():
    f = Reward(lambda x: x.sum(1)) + 2.0 * (0.5 * PathKL() + DriftPenalty())
    assert [(c, term.name) for c, term in f.terms] == [(1, "reward"), (1, "path_kl"), (2, "drift_penalty")]
    assert f.with_weight(PathKL, 3.0).weight(PathKL) == 3 and f.weight(PathKL) == 1
    assert [term.name for _, term in f.with_weight(PathKL, 0.0).running] == ["drift_penalty"]
    with pytest.raises(InvalidInputError, match="finite"):
        float("nan") * PathKL()
    with pytest.raises(InvalidInputError, match="different names"):
        PathKL() + PathKL()
