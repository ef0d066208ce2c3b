"""Every combination on the list of verified ones, row by row, and which of them are the same sampler."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from implicit_diffusion.tables.scheduler import read_table
from implicit_diffusion.tables.verified import MORE_STEPS, STEPS, VERIFIED, Case, markdown
from tests.helpers.parity import double, make, parity_error, single_inside

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


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=[pytest.mark.slow] * (i % 3 != 0)) for i in range(len(VERIFIED))],
    ids=lambda i: f"{i}-{VERIFIED[i].scheduler}",
)
def test_every_row_of_every_supported_case_is_the_schedulers_step(number):
    for i, case in enumerate(VERIFIED[number].cases()):
        for num_steps in STEPS + (MORE_STEPS if i == 0 else ()):
            check(case, num_steps, doubled=num_steps == 10 and i % 3 == 0)


@pytest.mark.parametrize("case", MORE, ids=str)
@pytest.mark.parametrize("num_steps", [1, 10])
def test_other_options_too(case, num_steps):
    check(case, num_steps, doubled=num_steps == 10)


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


def test_the_documentation_shows_this_list():
    page = Path(__file__).parents[2] / "docs" / "howto" / "schedulers.md"
    assert markdown() in page.read_text(encoding="utf-8")
