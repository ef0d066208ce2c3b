"""Tables against `scheduler.step`, at random x, u and ξ on every row, and refusals of what is no table."""

import copy
import inspect
import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from implicit_diffusion.denoisers.scheduler import read_table
from implicit_diffusion.errors import InvalidInputError, NonAffineError

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
DDPM = [
    pytest.param(
        DDPMScheduler, {"variance_type": v, "timestep_spacing": s, "prediction_type": p}, {}, id=f"ddpm-{v}-{s}-{p}"
    )
    for v, s, p in itertools.product(("fixed_small", "fixed_large", "fixed_small_log"), SPACINGS, PREDICTIONS)
]
DDIM = [
    pytest.param(DDIMScheduler, {"timestep_spacing": s, "prediction_type": p}, {"eta": eta}, id=f"ddim-{eta}-{s}-{p}")
    for eta, s, p in itertools.product((0.0, 0.3, 1.0), SPACINGS, PREDICTIONS)
]
MORE = [
    pytest.param(
        DDPMScheduler, {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}, {}, id="cosine"
    ),
    pytest.param(DDPMScheduler, {"steps_offset": 1}, {}, id="ddpm-offset"),
    pytest.param(DDIMScheduler, {"steps_offset": 1, "set_alpha_to_one": False}, {"eta": 1.0}, id="ddim-offset"),
    pytest.param(
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"eta": 0.5},
        id="zero-snr",
    ),
]


def make(scheduler_class, config):
    return scheduler_class(clip_sample=False, **config)


def double(scheduler):
    """A copy whose coefficient tensors are float64."""
    scheduler = copy.deepcopy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(scheduler, name, value.double())
    return scheduler


def parity_error(scheduler, table, options, dtype=torch.float64):
    """Largest |step − table| over all rows, relative to the row's largest term a x, b u or s ξ (where above 1)."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(len(table))
    draws = torch.Generator().manual_seed(20)
    worst = 0.0
    for k in range(len(table)):
        x, u = (torch.randn(3, 2, 5, 5, generator=draws, dtype=torch.float64).to(dtype) for _ in "xu")
        xi = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=dtype)
        t = scheduler.timesteps[k]
        assert float(t) == table.t[k]
        if hasattr(scheduler, "scale_model_input"):
            torch.testing.assert_close(scheduler.scale_model_input(x, t), (table.m[k] * x).to(dtype), rtol=1e-6, atol=0)
        generator = torch.Generator().manual_seed(k)
        y = scheduler.step(u, t, x, generator=generator, return_dict=False, **options)[0]
        terms = [table.a[k] * x, table.b[k] * u, table.s[k] * xi]
        size = max(1.0, *(float(term.abs().max()) for term in terms))
        worst = max(worst, float((y - sum(terms)).abs().max()) / size)
    return worst


@pytest.mark.parametrize(
    ("scheduler_class", "config", "options", "num_steps"),
    [pytest.param(*case.values, n, id=f"{case.id}-{n}") for case in DDPM + DDIM + MORE for n in (1, 10)]
    # An N that does not divide T, and a longer chain, for every eleventh case.
    + [pytest.param(*case.values, n, id=f"{case.id}-{n}") for case in (DDPM + DDIM + MORE)[::11] for n in (13, 50)],
)
def test_every_row_is_the_schedulers_step(scheduler_class, config, options, num_steps):
    scheduler = make(scheduler_class, config)
    table = read_table(scheduler, num_steps, **options)
    assert len(table) == num_steps
    assert parity_error(scheduler, table, options) < 1e-12  # float32 coefficients, float64 arithmetic
    assert parity_error(scheduler, table, options, dtype=torch.float32) < 1e-6  # as a pipeline runs it
    exact = double(scheduler)
    assert parity_error(exact, read_table(exact, num_steps, **options), options) < 1e-12


def test_parity_with_all_training_timesteps():
    scheduler = DDPMScheduler(num_train_timesteps=100, clip_sample=False)
    assert parity_error(scheduler, read_table(scheduler, 100), {}) < 1e-12


def test_parity_would_notice_a_wrong_table():
    scheduler = make(DDPMScheduler, {})
    table = read_table(scheduler, 10)
    for column in "abs":
        getattr(table, column)[4] *= 1 + 1e-5
        assert parity_error(scheduler, table, {}) > 1e-7
        getattr(table, column)[4] /= 1 + 1e-5


def test_ddpm_agrees_with_its_formula():
    """Ho et al., arXiv 2006.11239, eq. 7 and 11, in float64 between the timesteps t and t'."""
    scheduler = double(make(DDPMScheduler, {"timestep_spacing": "trailing"}))
    table = read_table(scheduler, 10)
    bar = scheduler.alphas_cumprod[table.t.long()]
    bar_next = torch.cat([bar[1:], torch.ones(1, dtype=torch.float64)])
    beta = 1 - bar / bar_next
    torch.testing.assert_close(table.a, (bar / bar_next) ** -0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(table.b, -beta * table.a / (1 - bar).sqrt(), rtol=1e-11, atol=0)
    variance = ((1 - bar_next) / (1 - bar) * beta).clamp(min=1e-20)
    torch.testing.assert_close(table.s, variance.sqrt(), rtol=1e-12, atol=0)
    assert table.noiseless() == (9,)
    assert table.s[9] == pytest.approx(1e-10, rel=1e-12)


def test_last_rows_differ_by_spacing_and_variance():
    """Leading ends at t = 0, where DDPM adds no noise; trailing ends above it, and fixed_large then adds much."""
    last = {
        (spacing, variance): read_table(
            make(DDPMScheduler, {"timestep_spacing": spacing, "variance_type": variance}), 10
        )
        .s[-1]
        .item()
        for spacing in ("leading", "trailing")
        for variance in ("fixed_small", "fixed_large")
    }
    assert last["leading", "fixed_small"] == last["leading", "fixed_large"] == 0
    assert last["trailing", "fixed_small"] == pytest.approx(1e-10)
    assert last["trailing", "fixed_large"] > 0.3


def test_the_callers_scheduler_is_untouched():
    scheduler = make(DDIMScheduler, {})
    before = copy.deepcopy(vars(scheduler))
    read_table(scheduler, 10, eta=0.5)
    after = vars(scheduler)
    assert before.keys() == after.keys()
    assert scheduler.num_inference_steps is None
    assert torch.equal(before["timesteps"], after["timesteps"])


def test_the_global_generator_is_untouched():
    state = torch.random.get_rng_state()
    read_table(make(DDPMScheduler, {}), 5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_time_name_and_initial_noise():
    table = read_table(make(DDIMScheduler, {"timestep_spacing": "trailing"}), 4, eta=0.5)
    assert table.t.tolist() == [999, 749, 499, 249]
    assert table.h.tolist() == [0.25] * 4
    assert table.initial_std == 1.0
    assert table.name == "DDIM, 4 steps, trailing, epsilon, eta=0.5"


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler(), EulerAncestralDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()]
)
def test_schedulers_with_a_step_counter_and_scaled_inputs(scheduler):
    """They compute in float32 inside; here because the probing is to hold for them as it stands."""
    table = read_table(scheduler, 10)
    assert parity_error(scheduler, table, {}) < 1e-6
    assert (table.m[0] < 1) == hasattr(scheduler, "scale_model_input")


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DDPMScheduler(), {}, "clip_sample=False.*--no-clip"),
        (DDIMScheduler(), {}, "clip_sample=False.*--no-clip"),
        (DDPMScheduler(clip_sample=False, thresholding=True), {}, "thresholding=False.*--no-clip"),
        (DDPMScheduler(clip_sample=False, variance_type="learned"), {}, "learned.*network sets the noise"),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), {}, "learned_range"),
        (DDPMScheduler(clip_sample=False, variance_type="fixed_large_log"), {}, "NaN; use 'fixed_large'"),
        (DDIMScheduler(clip_sample=False), {"use_clipped_model_output": True}, "use_clipped_model_output"),
        (DPMSolverMultistepScheduler(), {}, r"row 1 \(t = .*relative residual .*multistep"),
        (UniPCMultistepScheduler(), {}, r"row 1 .*multistep"),
        (LMSDiscreteScheduler(), {}, r"row 1 .*multistep"),
        (HeunDiscreteScheduler(), {}, "19 network calls for num_steps = 10"),
        (PNDMScheduler(), {}, "network calls for num_steps = 10"),
    ],
)
def test_what_is_no_table_is_refused_with_advice(scheduler, options, message):
    with pytest.raises(NonAffineError, match=message):
        read_table(scheduler, 10, **options)


class SoftClipped(DDPMScheduler):
    """Bends large states only, below any option that could be checked by name."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return (super().step(model_output, timestep, sample, generator, return_dict=False)[0].clamp(-30, 30),)


def test_a_clip_beyond_the_fitted_points_shows_in_the_verification():
    with pytest.raises(NonAffineError, match=r"row 0 .*not affine.*scale 100"):
        read_table(SoftClipped(clip_sample=False), 10)


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.0, True, "10"])
def test_number_of_steps_out_of_range(num_steps):
    # Through the function beneath the run-time type checks, which would refuse some of these first.
    with pytest.raises(InvalidInputError, match="num_steps"):
        inspect.unwrap(read_table)(make(DDPMScheduler, {}), num_steps)


def test_trailing_spacing_that_rounds_to_one_step_too_many():
    with pytest.raises(NonAffineError, match=r"62 timesteps for num_steps = 61.*divides 1000"):
        read_table(make(DDPMScheduler, {"timestep_spacing": "trailing"}), 61)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"etta": 1.0}, "no option 'etta'; it has eta, use_clipped"), ({"generator": None}, "given by the chain")],
)
def test_step_options_are_checked(options, message):
    with pytest.raises(InvalidInputError, match=message):
        read_table(make(DDIMScheduler, {}), 5, **options)


@pytest.mark.parametrize(
    ("scheduler", "options", "num_steps", "message"),
    [
        (DDIMScheduler(clip_sample=False), {"eta": 3.0}, 10, "not finite.*eta > 1"),
        (
            DDPMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            {},
            10,
            "zero terminal",
        ),
        (DDPMScheduler(clip_sample=False, steps_offset=1), {}, 1000, "lower its steps_offset"),
        (object(), {}, 10, "must be a diffusers scheduler, got object"),
    ],
)
def test_unusable_schedulers(scheduler, options, num_steps, message):
    with pytest.raises(InvalidInputError, match=message):
        read_table(scheduler, num_steps, **options)
