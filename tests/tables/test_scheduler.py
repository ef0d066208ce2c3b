"""Tables against `scheduler.step`, at random x, u and ξ on every row, and refusals of what is not a table."""

import copy
import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KarrasVeScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from implicit_diffusion.errors import InvalidInputError, NonAffineError
from implicit_diffusion.tables.scheduler import read_table
from tests.helpers.parity import double, make, parity_error


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
    ("scheduler", "options", "message"),
    [
        (DDPMScheduler(), {}, "with `clip_sample=False`"),
        (DDIMScheduler(), {}, "with `clip_sample=False`"),
        (DDPMScheduler(clip_sample=False, thresholding=True), {}, "with `thresholding=False`"),
        (DDPMScheduler(clip_sample=False, variance_type="learned"), {}, "learned.*network sets the noise"),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), {}, "learned_range"),
        (DDPMScheduler(clip_sample=False, variance_type="fixed_large_log"), {}, "NaN; use 'fixed_large'"),
        (DDIMScheduler(clip_sample=False), {"use_clipped_model_output": True}, "use_clipped_model_output"),
        (DPMSolverMultistepScheduler(), {}, "solver_order=2.*multistep.*solver_order=1"),
        (DPMSolverSinglestepScheduler(solver_order=3), {}, "solver_order=3.*second-order"),
        (UniPCMultistepScheduler(), {}, "solver_order=2.*multistep"),
        (UniPCMultistepScheduler(solver_order=1), {}, r"row 1 \(t = .*relative residual .*multistep"),
        (LMSDiscreteScheduler(), {}, r"row 1 \(t = .*relative residual .*multistep"),
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
    ("scheduler", "options", "message"),
    [
        (DDIMScheduler(clip_sample=False), {"etta": 1.0}, "no option 'etta'; it has eta, use_clipped"),
        (DDIMScheduler(clip_sample=False), {"generator": None}, "given by the chain"),
        (EulerDiscreteScheduler(), {"s_churn": 5.0}, "after the network has looked.*EulerAncestralDiscreteScheduler"),
        (FlowMatchEulerDiscreteScheduler(), {"s_churn": 5.0}, "ignores the option.*memoryless_flow"),
        (FlowMatchEulerDiscreteScheduler(), {"per_token_timesteps": torch.ones(1)}, "a row of a table has one time"),
    ],
)
def test_step_options_are_checked(scheduler, options, message):
    with pytest.raises(InvalidInputError, match=message):
        read_table(scheduler, 5, **options)


def test_no_churn_is_no_option():
    plain, spelled = (read_table(EulerDiscreteScheduler(), 5, **o) for o in ({}, {"s_churn": 0.0, "s_noise": 1.0}))
    for column in "abs":
        torch.testing.assert_close(getattr(plain, column), getattr(spelled, column), rtol=1e-12, atol=1e-14)
    assert (plain.s == 0).all()


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
        (EulerAncestralDiscreteScheduler(prediction_type="sample"), {}, 10, "not implemented yet: sample"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}, 10, r"mu=.*or.*use_dynamic_shifting=False"),
        (FlowMatchEulerDiscreteScheduler(), {"mu": 1.0}, 10, "mu=1 needs a scheduler with use_dynamic_shifting=True"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), {}, 1, "not finite.*shift_terminal with a single step"),
        (KarrasVeScheduler(), {}, 10, r"step\(u, t, x\) fails"),
        (
            DPMSolverMultistepScheduler(solver_order=1, timestep_spacing="leading", num_train_timesteps=20),
            {},
            20,
            "first two timesteps are both 0",
        ),
    ],
)
def test_unusable_schedulers(scheduler, options, num_steps, message):
    with pytest.raises(InvalidInputError, match=message):
        read_table(scheduler, num_steps, **options)


def test_a_table_is_the_same_to_the_last_bit_wherever_memory_lies():
    """Runs are reproducible bit for bit, and what is remembered between them is found again."""
    held, tables = [], []
    for i in range(12):
        held.append(torch.empty(1 + 7 * i, dtype=torch.uint8))  # moves what is allocated next
        tables.append(read_table(DDPMScheduler(timestep_spacing="trailing", clip_sample=False), 2).to_dict())
    assert all(table == tables[0] for table in tables)
