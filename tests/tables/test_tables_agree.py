"""When two tables are the same sampler; what a flow's rows cover; the resolution's shift, in closed form."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from implicit_diffusion.tables.flow import memoryless_flow
from implicit_diffusion.tables.scheduler import read_table
from implicit_diffusion.tables.table import ChainTable

F64 = torch.float64


def table(scaled=True):
    draws = torch.Generator().manual_seed(0)
    columns = {name: 0.5 + torch.rand(5, generator=draws, dtype=F64) for name in "abshmt"}
    return ChainTable(**columns if scaled else columns | {"m": torch.ones(5, dtype=F64)}, initial_std=3.0)


def moved(one, name, row, by):
    column = getattr(one, name).clone()
    column[row] += by
    return replace(one, **{name: column})


@pytest.mark.parametrize("name", "abst")
@pytest.mark.parametrize("row", range(5))
def test_any_coefficient_on_any_row_tells_tables_apart(name, row):
    one = table()
    assert one.agrees_with(table()) and one.agrees_with(moved(one, name, row, 1e-5 if name != "t" else 0.0))
    assert not one.agrees_with(moved(one, name, row, 0.1)) and not moved(one, name, row, 0.1).agrees_with(one)
    assert one.agrees_with(moved(one, name, row, 0.1), tolerance=1.0) == (name != "t")


def test_so_do_the_initial_deviation_and_the_number_of_rows():
    one = table()
    assert not one.agrees_with(replace(one, initial_std=3.2)) and one.agrees_with(replace(one, initial_std=3.0003))
    shorter = ChainTable(**{name: getattr(one, name)[:4] for name in "abshmt"}, initial_std=3.0)
    assert not one.agrees_with(shorter) and not shorter.agrees_with(one)


def test_tables_are_compared_in_the_networks_scale():
    """The same sampler on another scale of x agrees; the same coefficients on another scale of the network do not."""
    one = table()
    plain = one.unscaled()
    assert one.agrees_with(plain) and plain.agrees_with(one)
    torch.testing.assert_close(plain.initial_std, float(one.m[0]) * 3.0)
    assert not one.agrees_with(replace(one, m=2 * one.m))
    for m in (0, 3):
        assert not one.agrees_with(moved(one, "m", m, 0.1))


def test_the_initial_deviation_is_the_schedulers():
    euler, ddim = read_table(EulerDiscreteScheduler(), 6), read_table(DDIMScheduler(clip_sample=False), 6)
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    assert euler.initial_std == pytest.approx(float(scheduler.init_noise_sigma)) and euler.initial_std > 10
    assert ddim.initial_std == 1.0
    assert euler.unscaled().initial_std == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}])
def test_a_row_of_the_flow_covers_the_time_between_its_levels(options):
    flow = memoryless_flow(FlowMatchEulerDiscreteScheduler(**options), 7)
    levels = torch.cat([flow.t / 1000, torch.zeros(1, dtype=F64)])
    torch.testing.assert_close(flow.h, levels[:-1] - levels[1:], rtol=1e-5, atol=1e-7)
    read = read_table(FlowMatchEulerDiscreteScheduler(**options), 7)
    torch.testing.assert_close(read.h, torch.full((7,), 1 / 7, dtype=F64))


@pytest.mark.parametrize("mu", [0.5, 0.8, 1.15])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_shift_by_resolution_moves_the_times(kind, mu):
    """σ ↦ e^μ/(e^μ + 1/σ − 1), or μ in the place of e^μ, of even levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    shift = torch.tensor(mu, dtype=F64).exp() if kind == "exponential" else torch.tensor(mu, dtype=F64)
    for found, even in (
        (memoryless_flow(scheduler, 9, mu=mu), 1 - torch.arange(9, dtype=F64) / 9),
        (read_table(scheduler, 9, mu=mu), torch.linspace(1, 1 / 1000, 9, dtype=F64)),
    ):
        expected = shift / (shift + 1 / even - 1)
        torch.testing.assert_close(found.t / 1000, expected, rtol=1e-5, atol=1e-6)
        levels = torch.cat([expected, torch.zeros(1, dtype=F64)])
        if (found.s == 0).all():  # x' = x + (σ' − σ) u
            torch.testing.assert_close(found.b, levels[1:] - levels[:-1], rtol=1e-4, atol=1e-6)
