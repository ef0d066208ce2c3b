"""How far a table is from `scheduler.step`, at random x, u and ξ on every row."""

import copy

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)


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
    assert table.initial_std == float(getattr(scheduler, "init_noise_sigma", 1.0))
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
