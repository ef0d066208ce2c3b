"""The combinations of scheduler and options whose tables are tested, row by row, against `scheduler.step`.

`VERIFIED` is the only list: the test goes through it, and `markdown` prints it for the documentation. A combination
that is not on it may still be a table (`read_table` asks the scheduler, not this list), or be refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from implicit_diffusion.extras import require

STEPS = (1, 10)  # numbers of steps for every combination
MORE_STEPS = (13, 50)  # one that does not divide the training steps, and a longer chain, for some combinations

Choice = Mapping[str, Any]  # a part of a scheduler's config
Axis = tuple[Choice, ...]  # of which a combination has one


def _axis(option: str, *values: Any) -> Axis:
    return tuple({option: value} for value in values)


SPACING_AXIS = _axis("timestep_spacing", "trailing", "leading", "linspace")
PREDICTION_AXIS = _axis("prediction_type", "epsilon", "sample", "v_prediction")
KARRAS, EXPONENTIAL, BETA = ({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))
SIGMA_AXIS: Axis = ({}, KARRAS, EXPONENTIAL, BETA)
DATA_FORM = _axis("algorithm_type", "dpmsolver++", "sde-dpmsolver++")
NOISE_FORM = _axis("algorithm_type", "dpmsolver", "sde-dpmsolver")
FIRST_ORDER = _axis("solver_order", 1)
TO_SIGMA_MIN = _axis("final_sigmas_type", "sigma_min")
DPM_TIMES: Axis = (*SPACING_AXIS, KARRAS, EXPONENTIAL, BETA, {"use_lu_lambdas": True})
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
DPM_FLOW: Axis = (FLOW, FLOW | {"flow_shift": 3.0})


@dataclass(frozen=True)
class VerifiedGrid:
    """A scheduler with axes of options: every combination of one choice per axis is verified.

    Args:
        scheduler: its class in diffusers.
        axes: parts of its config.
        step: options of `scheduler.step`, one dict per alternative.
        mu: exponents of the dynamic shift, None where there is none.
        note: a remark on the chains, for the documentation.
    """

    scheduler: str
    axes: tuple[Axis, ...]
    step: tuple[Mapping[str, float], ...] = ({},)
    mu: tuple[float | None, ...] = (None,)
    note: str = ""

    def cases(self) -> Iterator[Case]:
        """Every combination."""
        for choices, step, mu in itertools.product(itertools.product(*self.axes), self.step, self.mu):
            config = {option: value for choice in choices for option, value in choice.items()}
            yield Case(self.scheduler, config, dict(step), mu)


@dataclass(frozen=True)
class Case:
    """One scheduler with all its options."""

    scheduler: str
    config: dict[str, Any]
    step: dict[str, float] = field(default_factory=dict)
    mu: float | None = None

    def make(self) -> Any:
        """The diffusers scheduler, which never clips."""
        require("diffusers")
        import diffusers

        clip = {"clip_sample": False} if self.scheduler in ("DDPMScheduler", "DDIMScheduler") else {}
        return getattr(diffusers, self.scheduler)(**clip, **self.config)


VERIFIED = (
    VerifiedGrid(
        "DDPMScheduler",
        (PREDICTION_AXIS, SPACING_AXIS, _axis("variance_type", "fixed_small", "fixed_large", "fixed_small_log")),
        note="the default for checkpoints with a noise schedule",
    ),
    VerifiedGrid(
        "DDIMScheduler",
        (PREDICTION_AXIS, SPACING_AXIS),
        step=({"eta": 0.0}, {"eta": 0.3}, {"eta": 1.0}),
        note="eta = 1 is DDPM, eta = 0 has no noise",
    ),
    VerifiedGrid(
        "EulerDiscreteScheduler",
        (PREDICTION_AXIS, SPACING_AXIS, (*SIGMA_AXIS, {"final_sigmas_type": "sigma_min"})),
        note="no noise; is DDIM with eta = 0",
    ),
    VerifiedGrid(
        "EulerDiscreteScheduler",
        (PREDICTION_AXIS, ({"interpolation_type": "log_linear"}, {"timestep_type": "continuous"})),
        note="its other interpolation and timesteps",
    ),
    VerifiedGrid(
        "EulerAncestralDiscreteScheduler",
        (_axis("prediction_type", "epsilon", "v_prediction"), SPACING_AXIS),
        note="is DDPM with variance fixed_small",
    ),
    VerifiedGrid(
        "DPMSolverMultistepScheduler",
        (FIRST_ORDER, PREDICTION_AXIS, DPM_TIMES, DATA_FORM),
        note="dpmsolver++ has no noise and is DDIM with eta = 0, sde-dpmsolver++ is DDPM",
    ),
    VerifiedGrid(
        "DPMSolverMultistepScheduler",
        (FIRST_ORDER, _axis("prediction_type", "epsilon"), DPM_TIMES, NOISE_FORM, TO_SIGMA_MIN),
        note="for other predictions diffusers itself loses five digits to cancellation in float32",
    ),
    VerifiedGrid(
        "DPMSolverSinglestepScheduler",
        (FIRST_ORDER, PREDICTION_AXIS, SIGMA_AXIS, DATA_FORM, _axis("lower_order_final", True)),
        note="the same rows",
    ),
    VerifiedGrid(
        "DPMSolverMultistepScheduler",
        (FIRST_ORDER, DPM_FLOW, DATA_FORM),
        note="flow models; sde-dpmsolver++ has the rows of `memoryless_flow`, at times of its own",
    ),
    VerifiedGrid(
        "FlowMatchEulerDiscreteScheduler",
        (_axis("shift", 1.0, 3.0), SIGMA_AXIS, _axis("stochastic_sampling", False, True)),
        note="no noise; stochastic_sampling renoises the predicted data, whose law is not the model's",
    ),
    VerifiedGrid(
        "FlowMatchEulerDiscreteScheduler",
        (({"use_dynamic_shifting": True},), _axis("time_shift_type", "exponential", "linear")),
        mu=(0.5, 1.15),
        note="shift by resolution, `read_table(..., mu=...)`",
    ),
)


def cases() -> Iterator[Case]:
    """All combinations of all grids."""
    for grid in VERIFIED:
        yield from grid.cases()


def markdown() -> str:
    """`VERIFIED` as the table of the documentation."""
    lines = ["| scheduler | every combination of | combinations | remark |", "|---|---|---|---|"]
    for grid in VERIFIED:
        axes = [_words(axis) for axis in (*grid.axes, grid.step)]
        if grid.mu != (None,):
            axes.append("`mu` " + ", ".join(map(str, grid.mu)))
        count = sum(1 for _ in grid.cases())
        lines.append(f"| {grid.scheduler} | {'; '.join(filter(None, axes))} | {count} | {grid.note} |")
    return "\n".join(lines)


def _words(axis: Axis) -> str:
    """An axis in one line: `timestep_spacing` trailing, leading, linspace."""
    options = {option for choice in axis for option in choice}
    if len(options) == 1 and all(axis) and not isinstance(next(iter(axis[0].values())), bool):
        (option,) = options
        return f"`{option}` " + ", ".join(str(choice[option]) for choice in axis)
    if not options:
        return ""
    return " or ".join(" with ".join(f"`{k}={v}`" for k, v in choice.items()) or "default sigmas" for choice in axis)
