"""The discrete adjoint against full backpropagation and against closed forms."""

import pytest
import torch
from torch import nn

from implicit_diffusion.gradients import Adjoint, FullBackprop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.ornstein_uhlenbeck import ou_probability_flow, ou_reverse_sde
from tests.helpers.oracles import affine_chain, exact_terms, table


class SmallUNet(nn.Module):
    """A diffusers U-Net of two levels in float64, away from its initial weights in every layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = UNet2DModel(
                sample_size=8,
                in_channels=1,
                out_channels=1,
                layers_per_block=1,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                dropout=dropout,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ).double()
        g = torch.Generator().manual_seed(1)
        for p in self.net.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)

    def forward(self, x, t):
        return self.net(x, t).sample


def perturb(module: nn.Module, scale: float = 0.05) -> None:
    g = torch.Generator().manual_seed(2)
    for p in module.parameters():
        p.data += scale * torch.randn(p.shape, generator=g, dtype=p.dtype)


def gradients(estimator, chain, objective, batch=3):
    for p in chain.denoiser.parameters():
        p.grad = None
    values = estimator(chain, objective, Noise(3), batch)
    return [p.grad.clone() for p in chain.denoiser.parameters() if p.grad is not None], values


def reward(x):
    return torch.tanh(x.flatten(1)).mean(1) + 0.1 * x.flatten(1).square().mean(1).neg()


UNET_CHAINS = {
    "stochastic": (table(5), (), Reward(reward)),
    "stochastic, path KL": (table(5, scaled=True), (), Reward(reward) + 0.3 * PathKL()),
    "path KL, pretrained rows": (table(5), (0, 4), Reward(reward) + 0.3 * PathKL()),
    "deterministic": (table(5, noise=False), (), Reward(reward)),
    "deterministic, drift penalty": (table(5, noise=False), (2,), Reward(reward) + 0.7 * DriftPenalty()),
    "reverse SDE": (ou_reverse_sde(6, 2.0), (), Reward(reward) + 0.2 * PathKL() + 0.1 * DriftPenalty()),
    "probability flow": (ou_probability_flow(6, 2.0), (), 2.0 * Reward(reward)),
    "costs alone": (table(4), (), 0.3 * PathKL()),
}


@pytest.mark.parametrize("case", UNET_CHAINS)
def test_equals_full_backpropagation_on_a_unet(case):
    rows, pretrained, objective = UNET_CHAINS[case]
    chain = Chain(SmallUNet(), rows, (1, 8, 8), pretrained_rows=pretrained)
    perturb(chain.denoiser)
    ours, values = gradients(Adjoint(), chain, objective)
    reference, reference_values = gradients(FullBackprop(), chain, objective)
    assert len(ours) == len(reference) > 0
    scale = max(g.abs().max() for g in reference)
    assert max((a - b).abs().max() for a, b in zip(ours, reference)) < 1e-10 * scale
    assert values.keys() == reference_values.keys()
    for name in values:
        torch.testing.assert_close(values[name], reference_values[name], rtol=1e-12, atol=1e-12)


def test_dropout_is_off_inside_and_the_mode_restored():
    chain = Chain(SmallUNet(dropout=0.5), table(4), (1, 8, 8))
    chain.denoiser.train()
    first, _ = gradients(Adjoint(), chain, Reward(reward))
    second, _ = gradients(Adjoint(), chain, Reward(reward))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert chain.denoiser.training


def test_equals_closed_form_on_a_deterministic_linear_chain():
    """Without noise the batch enters through its moments alone, so the closed form is exact for any batch."""
    chain, quadratic = affine_chain(6, 3, noise=False, pretrained_rows=(2,))
    perturb(chain.denoiser, 0.2)
    (g_gain, g_shift), values = gradients(Adjoint(), chain, Reward(quadratic) + 0.4 * DriftPenalty(), batch=7)
    x0 = chain.initial(Noise(3), 7)
    r, _, drift = exact_terms(chain, quadratic, x0.mean(0), x0.square().mean(0))
    expected = torch.autograd.grad(-r + 0.4 * drift, list(chain.denoiser.parameters()))
    torch.testing.assert_close(g_gain, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g_shift, expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values["drift_penalty"], drift.detach(), rtol=1e-12, atol=1e-12)


def estimates(mutate=lambda objective: objective, beta=0.5):
    """The adjoint on 400 independent batches of a stochastic linear chain, and the exact gradient."""
    chain, quadratic = affine_chain(4, 2, pretrained_rows=(3,))
    perturb(chain.denoiser, 0.2)
    objective = mutate(Reward(quadratic) + beta * PathKL())
    parameters = list(chain.denoiser.parameters())
    draws = []
    for index in range(400):
        for p in parameters:
            p.grad = None
        Adjoint()(chain, objective, Noise(5), 250, index)
        draws.append(torch.cat([p.grad.flatten() for p in parameters]))
    r, kl, _ = exact_terms(chain, quadratic)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-r + beta * kl, parameters)])
    return torch.stack(draws), exact


def z_of_projection(draws, exact):
    """z-score of ⟨Γ, ∇ℓ⟩/‖∇ℓ‖², which is 1 in the mean, and its standard error."""
    share = draws @ exact / exact.square().sum()
    error = share.std() / len(share) ** 0.5
    return (share.mean() - 1) / error, error


def test_unbiased_on_a_stochastic_linear_chain():
    draws, exact = estimates()
    z, error = z_of_projection(draws, exact)
    assert error < 0.02 / 4  # a 2 % error of Γ would show at 4 σ
    assert abs(z) < 4
    moved = exact != 0
    assert not moved.all() and (draws[:, ~moved] == 0).all()  # pretrained rows are left alone
    each = (draws.mean(0) - exact)[moved] / (draws.std(0)[moved] / len(draws) ** 0.5)
    assert each.abs().max() < 4.5


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(lambda f: 1.02 * f, id="2 % of everything", marks=pytest.mark.slow),
        pytest.param(lambda f: -1.0 * f, id="sign", marks=pytest.mark.slow),
        pytest.param(lambda f: f.with_weight(PathKL, 0.25), id="half the KL", marks=pytest.mark.slow),
        pytest.param(lambda f: f.with_weight(PathKL, -0.5), id="sign of the KL", marks=pytest.mark.slow),
    ],
)
def test_the_test_sees_mutations(mutate):
    draws, exact = estimates(mutate)
    z, _ = z_of_projection(draws, exact)
    each = (draws.mean(0) - exact)[exact != 0] / (draws.std(0)[exact != 0] / len(draws) ** 0.5)
    assert abs(z) > 4 or each.abs().max() > 4.5
