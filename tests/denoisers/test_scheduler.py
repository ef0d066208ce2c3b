"""Tables against `scheduler.step`, at random x, u and ξ on every row, and refusals of what is no table."""

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

from implicit_diffusion.denoisers.scheduler import read_table
from implicit_diffusion.denoisers.supported import MORE_STEPS, STEPS, SUPPORTED, Case
from implicit_diffusion.errors import InvalidInputError, NonAffineError

MORE = [
    Case("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}),
    Case("DDPMScheduler", {"steps_offset": 1}),
    Case("DDIMScheduler", {"steps_offset": 1, "set_alpha_to_one": False}, {"eta": 1.0}),
    Case(
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"eta": 0.5},
    ),
    Case("EulerAncestralDiscreteScheduler", {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
    Case("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
]


def make(scheduler_class, config):
    return scheduler_class(clip_sample=False, **config)


def double(scheduler):
    """A copy whose coefficient tensors are float64, also those that `set_timesteps` makes."""

    class Double(type(scheduler)):
        def set_timesteps(self, *arguments, **options):
            super().set_timesteps(*arguments, **options)
            to_double(self, but=("timesteps",))

    scheduler = copy.deepcopy(scheduler)
    to_double(scheduler)
    scheduler.__class__ = Double
    return scheduler


def to_double(scheduler, but=()):
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in but:
            setattr(scheduler, name, value.double())


def single_inside(scheduler):
    """Whether `step` multiplies a float32 state or noise, whatever the precision of its coefficients."""
    config = scheduler.config
    return (
        isinstance(scheduler, DPMSolverMultistepScheduler)
        or config.get("stochastic_sampling", False)
        or (
            isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
            and config.prediction_type == "v_prediction"
        )
    )


def parity_error(scheduler, table, options, dtype=torch.float64, mu=None):
    """Largest |step − table| over all rows, relative to the row's largest term a x, b u or s ξ (where above 1)."""
    draws_single = isinstance(scheduler, DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(len(table), **({} if mu is None else {"mu": mu}))
    draws = torch.Generator().manual_seed(20)
    worst = 0.0
    for k in range(len(table)):
        # As float32 holds them: some schedulers cast the state.
        x, u = (torch.randn(3, 2, 5, 5, generator=draws).to(dtype) for _ in "xu")
        generator = torch.Generator().manual_seed(k)
        xi = torch.randn(x.shape, generator=generator, dtype=torch.float32 if draws_single else dtype).to(dtype)
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


def check(case, num_steps, doubled=False):
    scheduler = case.make()
    table = read_table(scheduler, num_steps, mu=case.mu, **case.step)
    assert len(table) == num_steps
    exact = not single_inside(scheduler)
    error = parity_error(scheduler, table, case.step, mu=case.mu)  # float32 coefficients, float64 arithmetic
    assert error < (1e-12 if exact else 1e-6), (case, num_steps, error)
    error = parity_error(scheduler, table, case.step, dtype=torch.float32, mu=case.mu)  # as a pipeline runs it
    assert error < 1e-6, (case, num_steps, error)
    if exact and doubled:
        scheduler = double(scheduler)
        table = read_table(scheduler, num_steps, mu=case.mu, **case.step)
        error = parity_error(scheduler, table, case.step, mu=case.mu)
        assert error < 1e-12, (case, num_steps, error)


@pytest.mark.parametrize("number", range(len(SUPPORTED)), ids=lambda i: f"{i}-{SUPPORTED[i].scheduler}")
def test_every_row_of_every_supported_case_is_the_schedulers_step(number):
    for i, case in enumerate(SUPPORTED[number].cases()):
        for num_steps in STEPS + (MORE_STEPS if i == 0 else ()):
            check(case, num_steps, doubled=num_steps == 10 and i % 3 == 0)


@pytest.mark.parametrize("case", MORE, ids=str)
@pytest.mark.parametrize("num_steps", [1, 10])
def test_other_options_too(case, num_steps):
    check(case, num_steps, doubled=num_steps == 10)


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


TRAILING = {"timestep_spacing": "trailing"}
ONE_CHAIN = {
    "ddim": (DDIMScheduler(clip_sample=False, **TRAILING), {"eta": 1.0}),
    "ancestral Euler": (EulerAncestralDiscreteScheduler(**TRAILING), {}),
    "SDE-DPM-Solver++": (
        DPMSolverMultistepScheduler(solver_order=1, algorithm_type="sde-dpmsolver++", **TRAILING),
        {},
    ),
}
ONE_FLOW = {
    "Euler": EulerDiscreteScheduler(**TRAILING),
    "DPM-Solver++": DPMSolverMultistepScheduler(solver_order=1, **TRAILING),
}


def assert_same_sampler(table, other):
    """In the network's own scale, to the precision of float32 σ's; the start to 1/2σ² = 2e−5."""
    table, other = table.unscaled(), other.unscaled()
    for column, atol in (("a", 1e-5), ("b", 2e-5), ("s", 1e-5), ("m", 0), ("t", 0)):
        torch.testing.assert_close(getattr(table, column), getattr(other, column), rtol=1e-4, atol=atol)
    assert table.initial_std == pytest.approx(other.initial_std, rel=1e-4)


@pytest.mark.parametrize("name", ONE_CHAIN)
def test_four_names_for_ddpm(name):
    scheduler, options = ONE_CHAIN[name]
    assert_same_sampler(read_table(scheduler, 10, **options), read_table(make(DDPMScheduler, TRAILING), 10))


@pytest.mark.parametrize("name", ["Euler", "DPM-Solver++"])
def test_three_names_for_the_probability_flow(name):
    assert_same_sampler(read_table(ONE_FLOW[name], 10), read_table(make(DDIMScheduler, TRAILING), 10))


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
        (DDPMScheduler(), {}, "clip_sample=False.*--no-clip"),
        (DDIMScheduler(), {}, "clip_sample=False.*--no-clip"),
        (DDPMScheduler(clip_sample=False, thresholding=True), {}, "thresholding=False.*--no-clip"),
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
    assert all(torch.equal(getattr(plain, c), getattr(spelled, c)) for c in "abs") and (plain.s == 0).all()


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
        (KarrasVeScheduler(), {}, 10, "does not make the step"),
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
