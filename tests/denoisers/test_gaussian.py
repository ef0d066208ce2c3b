"""The Gaussian denoiser against autograd, against each other prediction, and through schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.tables.ornstein_uhlenbeck import ou_marginal
from implicit_diffusion.tables.scheduler import read_table

F64 = torch.float64
MEAN = torch.tensor([[0.5, -1.0], [2.0, 0.0]], dtype=F64)
VARIANCE = torch.tensor([[0.3, 1.0], [2.0, 0.1]], dtype=F64)


def test_the_score_is_the_gradient_of_the_log_density():
    t = torch.tensor([0.2, 1.0, 2.0], dtype=F64)
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64, requires_grad=True)
    alpha, sigma = (c[:, None, None] for c in ou_marginal(t))
    density = torch.distributions.Normal(alpha * MEAN, (alpha**2 * VARIANCE + sigma**2).sqrt())
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(GaussianDenoiser.ornstein_uhlenbeck(MEAN, VARIANCE)(x, t), score)


def test_the_conditional_mean_is_that_of_a_regression():
    """E[X_0 | x_t] = μ + cov(X_0, x_t) var(x_t)⁻¹ (x − E x_t), with the moments from 10⁶ draws of (X_0, x_t)."""
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.4], dtype=F64)
    alpha, sigma = ou_marginal(t)
    x_0 = 0.7 + 0.5**0.5 * torch.randn(10**6, generator=generator, dtype=F64)
    x_t = alpha * x_0 + sigma * torch.randn(10**6, generator=generator, dtype=F64)
    slope = torch.cov(torch.stack([x_0, x_t]))[0, 1] / x_t.var()
    denoiser = GaussianDenoiser.ornstein_uhlenbeck(torch.tensor([0.7], dtype=F64), 0.5, "sample")
    x = torch.tensor([[1.5]], dtype=F64)
    # Standard error of the slope is below 1e−3.
    assert denoiser(x, t).item() == pytest.approx((x_0.mean() + slope * (1.5 - x_t.mean())).item(), abs=4e-3)


def test_predictions_are_one_another():
    t = torch.tensor([0.1, 0.7, 3.0], dtype=F64)
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    score, epsilon, sample, v = (
        GaussianDenoiser.ornstein_uhlenbeck(MEAN, VARIANCE, p)(x, t)
        for p in ("score", "epsilon", "sample", "v_prediction")
    )
    alpha, sigma = (c[:, None, None] for c in ou_marginal(t))
    torch.testing.assert_close(epsilon, -sigma * score)
    torch.testing.assert_close(alpha * sample + sigma * epsilon, x)
    torch.testing.assert_close(v, alpha * epsilon - sigma * sample)


@pytest.mark.parametrize(
    ("scheduler_class", "options"), [(DDPMScheduler, {}), (DDIMScheduler, {}), (DDIMScheduler, {"eta": 0.7})]
)
def test_all_prediction_types_give_one_chain(scheduler_class, options):
    """The same x_0 and noise end at the same x_N whichever quantity the network predicts."""
    outputs = []
    for prediction in ("epsilon", "sample", "v_prediction"):
        scheduler = scheduler_class(clip_sample=False, timestep_spacing="trailing", prediction_type=prediction)
        for name in ("alphas_cumprod", "betas", "alphas", "one", "final_alpha_cumprod"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())
        table = read_table(scheduler, 10, **options)
        denoiser = GaussianDenoiser.from_scheduler(MEAN, VARIANCE, scheduler)
        assert denoiser.prediction == prediction
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(4, 2, 2, generator=generator, dtype=F64)
        for k in range(10):
            xi = torch.randn(x.shape, generator=generator, dtype=F64)
            x = table.a[k] * x + table.b[k] * denoiser(table.m[k] * x, table.t[k].expand(4)) + table.s[k] * xi
        outputs.append(x)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-10, atol=1e-10)


def test_many_ddim_steps_map_noise_onto_the_data_law():
    """The probability flow of a Gaussian is x ↦ μ + √v x, up to 1/N and to ᾱ_T > 0."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    table = read_table(scheduler, 100)
    denoiser = GaussianDenoiser.from_scheduler(MEAN, VARIANCE, scheduler)
    start = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    x = start
    with torch.no_grad():
        for k in range(100):
            x = table.a[k] * x + table.b[k] * denoiser(x, table.t[k].expand(8))
    torch.testing.assert_close(x, MEAN + VARIANCE.sqrt() * start, rtol=0, atol=0.1)


def test_the_flow_prediction_is_epsilon_minus_sample():
    t = torch.tensor([1.0, 400.0, 1000.0], dtype=F64)
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    scheduler = FlowMatchEulerDiscreteScheduler()
    flow, epsilon, sample = (
        GaussianDenoiser.from_scheduler(MEAN, VARIANCE, scheduler, p)(x, t) for p in (None, "epsilon", "sample")
    )
    torch.testing.assert_close(flow, epsilon - sample)
    sigma = (t / 1000)[:, None, None]
    torch.testing.assert_close((1 - sigma) * sample + sigma * epsilon, x)


def test_the_mean_trains_and_the_variance_does_not():
    denoiser = GaussianDenoiser.ornstein_uhlenbeck(MEAN, VARIANCE)
    denoiser(torch.zeros(5, 2, 2, dtype=F64), torch.full((5,), 0.5, dtype=F64)).sum().backward()
    assert [name for name, _ in denoiser.named_parameters()] == ["mean"]
    assert denoiser.mean.grad.abs().min() > 0
    MEAN_before = MEAN.clone()
    with torch.no_grad():
        denoiser.mean.add_(1)
    assert torch.equal(MEAN, MEAN_before)


def test_single_precision_and_integer_times():
    denoiser = GaussianDenoiser.from_scheduler(MEAN.float(), 1.0, DDPMScheduler())
    assert denoiser(torch.zeros(2, 2, 2), torch.tensor([0, 999])).dtype == torch.float32


def test_bad_arguments():
    with pytest.raises(InvalidInputError, match="prediction must be one of score"):
        GaussianDenoiser.ornstein_uhlenbeck(MEAN, 1.0, "noise")
    with pytest.raises(InvalidInputError, match="variance must be positive"):
        GaussianDenoiser.ornstein_uhlenbeck(MEAN, 0.0)
    with pytest.raises(InvalidInputError, match=r"variance has shape \(3,\)"):
        GaussianDenoiser.ornstein_uhlenbeck(MEAN, torch.ones(3))
    with pytest.raises(InvalidInputError, match="has no alphas_cumprod"):
        GaussianDenoiser.from_scheduler(MEAN, 1.0, EDMEulerScheduler())
