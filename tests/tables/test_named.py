"""Kinds of chains: the right family, the same noise schedule, and a pipeline that samples the same, or says so."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.tables.flow import memoryless_flow
from implicit_diffusion.tables.named import NAMED_SAMPLERS, default_sampler, pipeline_for, scheduler_for, table_for
from implicit_diffusion.tables.scheduler import read_table
from tests.helpers import tiny

DIFFUSION = [name for name, kind in NAMED_SAMPLERS.items() if not kind.flow]
FLOW = [name for name, kind in NAMED_SAMPLERS.items() if kind.flow]
FAMILY = {
    "DDPM": DDPMScheduler(clip_sample=False, beta_end=0.015),
    "DDIM": DDIMScheduler(clip_sample=False, beta_end=0.015),
    "Euler": EulerDiscreteScheduler(beta_end=0.015, use_karras_sigmas=True),
    "ancestral": EulerAncestralDiscreteScheduler(beta_end=0.015),
    "DPM": DPMSolverMultistepScheduler(beta_end=0.015, use_karras_sigmas=True),
}


@pytest.fixture(scope="module")
def unet():
    return tiny.unet(**tiny.PLAIN)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", DIFFUSION)
def test_every_kind_of_every_diffusion_checkpoint_is_a_table(name, kind):
    checkpoint = FAMILY[name]
    before = copy.deepcopy(dict(checkpoint.config))
    scheduler = scheduler_for(checkpoint, kind)
    assert type(scheduler).__name__ == NAMED_SAMPLERS[kind].scheduler
    torch.testing.assert_close(scheduler.alphas_cumprod, checkpoint.alphas_cumprod)
    table = table_for(scheduler, kind, 5)
    assert table.t.tolist() == [999, 799, 599, 399, 199]
    assert dict(checkpoint.config) == before


@pytest.mark.parametrize("kind", DIFFUSION)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (10, 40))])
def test_all_noisy_kinds_are_one_chain_and_all_others_another(kind, prediction, num_steps):
    checkpoint = DDPMScheduler(clip_sample=False, prediction_type=prediction)
    noisy = kind in ("ddpm", "ddim", "euler-ancestral", "dpm-solver")
    table = table_for(scheduler_for(checkpoint, kind), kind, num_steps)
    assert table.agrees_with(read_table(scheduler_for(checkpoint, "ddim"), num_steps, eta=float(noisy)))
    assert not table.agrees_with(read_table(scheduler_for(checkpoint, "ddim"), num_steps, eta=0.5))


def test_they_differ_where_the_number_of_steps_does_not_divide():
    """Diffusers' DDIM steps from t to t − T//N, and its next row starts elsewhere."""
    checkpoint = DDPMScheduler(clip_sample=False)
    euler, ddim = (table_for(scheduler_for(checkpoint, kind), kind, 6, eta=0.0) for kind in ("euler", "ddim"))
    assert torch.equal(euler.t, ddim.t) and not euler.agrees_with(ddim) and euler.agrees_with(ddim, 0.05)


@pytest.mark.parametrize("kind", NAMED_SAMPLERS)
def test_the_folder_of_a_kind_samples_its_chain(kind, unet, tmp_path):
    """Plain diffusers on the saved folder, and our table with the same draws."""
    flow = NAMED_SAMPLERS[kind].flow
    checkpoint = FlowMatchEulerDiscreteScheduler(shift=2.0) if flow else DDPMScheduler(clip_sample=False)
    scheduler = scheduler_for(checkpoint, kind)
    saved, other = pipeline_for(scheduler, kind)
    folder = save_pipeline(tmp_path / "model", DiffusersDenoiser(unet), saved, "a test")
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert type(load_pretrained(folder).scheduler) is type(saved)

    table = table_for(scheduler, kind, 5, eta=0.0)  # DDIMPipeline's default
    for num_steps in (5, 6, 17):  # whether they divide T or not
        saved_table = table_for(saved, other, num_steps, eta=0.0)
        assert table_for(scheduler, kind, num_steps, eta=0.0).agrees_with(saved_table)
    assert table.unscaled().initial_std == pytest.approx(1, rel=3e-5)
    table = table.unscaled()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for k in range(5):
            mean = table.a[k] * x + table.b[k] * unet((table.m[k] * x).float(), table.t[k].expand(2).float()).sample
            x = mean + (table.s[k] * torch.randn(x.shape, generator=generator) if table.s[k] > 0 else 0)
    drawn = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    torch.testing.assert_close(torch.from_numpy(images), drawn, rtol=0, atol=1e-4)


def law(table, denoiser):
    """Variance of x_N and Cov(x_0, x_N) for x_0 ~ N(0, 1) and a denoiser u = p x + q."""
    q = denoiser(torch.zeros(len(table), 1).double(), table.t).flatten()
    factors = table.a + table.b * (denoiser(torch.ones(len(table), 1).double(), table.t).flatten() - q)
    variance = covariance = 1.0
    for factor, s in zip(factors.tolist(), table.s.tolist()):
        variance, covariance = factor**2 * variance + s**2, factor * covariance
    return variance, covariance


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_memoryless_kind_is_the_memoryless_flow_and_forgets(shift):
    """Up to 1/T in the noise levels, which changes ρ of the first row by N/T; next to nothing of x_0 is left."""
    checkpoint = FlowMatchEulerDiscreteScheduler(shift=shift)
    denoiser = GaussianDenoiser.from_scheduler(torch.tensor([1.3]).double(), 0.4, checkpoint)
    for num_steps in (5, 10, 50):
        table = table_for(scheduler_for(checkpoint, "flow-memoryless"), "flow-memoryless", num_steps)
        derived = memoryless_flow(checkpoint, num_steps)
        assert (table.t - derived.t).abs().max() <= 2
        for column in "abs":
            torch.testing.assert_close(
                getattr(table, column), getattr(derived, column), rtol=0, atol=1.5e-3 * num_steps
            )
        variance, covariance = law(table, denoiser)
        assert variance == pytest.approx(law(derived, denoiser)[0], rel=5e-3)
        assert covariance**2 < 1e-6 * variance  # the share of the output's variance that x_0 decides


def test_unusual_flows_take_the_derived_rows_and_no_pipeline():
    checkpoint = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler = scheduler_for(checkpoint, "flow-memoryless")
    table = table_for(scheduler, "flow-memoryless", 6)
    assert torch.equal(table.t, memoryless_flow(checkpoint, 6).t) and "karras" in table.name
    saved, kind = pipeline_for(scheduler, "flow-memoryless")
    assert kind == "flow-euler" and not table.agrees_with(table_for(saved, kind, 6))


def test_defaults_follow_the_checkpoint():
    assert {default_sampler(s) for s in FAMILY.values()} == {"ddpm"}
    assert default_sampler(FlowMatchEulerDiscreteScheduler()) == "flow-memoryless"
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert default_sampler(solver) == "flow-memoryless"
    assert scheduler_for(solver, "flow-euler").shift == 3.0
    with pytest.raises(InvalidInputError, match="EDMEulerScheduler has neither"):
        default_sampler(EDMEulerScheduler())


@pytest.mark.parametrize("kind", FLOW)
def test_flow_kinds_refuse_diffusion_models(kind):
    with pytest.raises(InvalidInputError, match=r"is for flow models.*predicts epsilon.*use one of ddpm, ddim, euler"):
        scheduler_for(DDPMScheduler(), kind)


@pytest.mark.parametrize("kind", DIFFUSION)
def test_diffusion_kinds_refuse_flow_models(kind):
    with pytest.raises(InvalidInputError, match=r"is for diffusion models.*noise − data.*flow-euler, flow-memoryless"):
        scheduler_for(FlowMatchEulerDiscreteScheduler(), kind)


@pytest.mark.parametrize("kind", ["euler", "euler-ancestral", "dpm-solver"])
def test_clipping_does_not_disappear_unasked(kind):
    with pytest.raises(InvalidInputError, match=r"sampled with clip_sample=True, which .* does not have.*clip=False"):
        scheduler_for(DDPMScheduler(clip_sample=True), kind)
    table_for(scheduler_for(DDPMScheduler(clip_sample=True), kind, clip=False), kind, 3)
    if kind != "dpm-solver":
        with pytest.raises(InvalidInputError, match="thresholding=True"):
            scheduler_for(DDPMScheduler(clip_sample=False, thresholding=True), kind)


def test_clipping_does_not_appear_unasked():
    for checkpoint in (FAMILY["Euler"], FAMILY["DPM"]):
        assert scheduler_for(checkpoint, "ddpm").config.clip_sample is False
        assert scheduler_for(checkpoint, "ddpm").config.variance_type == "fixed_small"


def test_dpm_solver_keeps_a_checkpoints_algorithm():
    for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
        solver = DPMSolverMultistepScheduler(algorithm_type=algorithm)
        assert scheduler_for(solver, "dpm-solver").config.algorithm_type == algorithm
    with pytest.warns(FutureWarning, match="deprecated"):
        solver = DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")
    assert scheduler_for(solver, "dpm-solver").config.final_sigmas_type == "sigma_min"
    assert scheduler_for(DDPMScheduler(), "dpm-solver", clip=False).config.algorithm_type == "sde-dpmsolver++"


def test_ancestral_euler_of_a_network_that_predicts_data():
    with pytest.raises(InvalidInputError, match="use ddpm, which is the same chain"):
        scheduler_for(DDPMScheduler(prediction_type="sample", clip_sample=False), "euler-ancestral")
