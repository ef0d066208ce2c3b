"""Named samplers, and which pipelines of diffusers run them.

    scheduler_for(checkpoint's scheduler, "ddpm", clip=False)  →  a scheduler with the same noise schedule
    table_for(scheduler, "ddpm", 10)                           →  its chain
    pipeline_for(scheduler, "euler")                           →  the scheduler of a pipeline that samples the same

Diffusion models (schedulers with `alphas_cumprod`) and flow models have different named samplers. The unconditional
pipelines of diffusers start at N(0, I) and do not scale the network's input. The two Euler samplers of diffusion models
work on another scale, but each equals a sampler that does not (`ChainTable.unscaled`): Euler is the first-order
DPM-Solver++ (DDIM without noise), and ancestral Euler is DDPM.

The memoryless flow is run by DPMSolverMultistepScheduler (first order, sde-dpmsolver++, flow sigmas): its rows are
those of `memoryless_flow` at noise levels from 1 − 1/T instead of 1, with times rounded down to integers. It has a
fixed shift only. A flow scheduler with another σ-spacing uses `memoryless_flow` itself, which no pipeline runs; the
saved pipeline then integrates the ODE of the same network, and the report of the run says so.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_choice, check_number, check_type
from implicit_diffusion.extras import require
from implicit_diffusion.tables.flow import is_flow, memoryless_flow
from implicit_diffusion.tables.refusals import check_scheduler
from implicit_diffusion.tables.scheduler import read_table
from implicit_diffusion.tables.table import ChainTable

SPACINGS = ("trailing", "leading", "linspace")
SIGMA_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
UNUSUAL_FLOWS = (*SIGMA_SPACINGS, "use_dynamic_shifting", "shift_terminal", "invert_sigmas")


@dataclass(frozen=True)
class NamedSampler:
    """What a name stands for.

    Args:
        scheduler: its class in diffusers.
        words: its name in reports.
        flow: whether it is for flow models; else it is for diffusion models.
        pipeline: name of the sampler whose scheduler a pipeline runs in its place; empty if that is its own.
    """

    scheduler: str
    words: str
    flow: bool = False
    pipeline: str = ""


NAMED_SAMPLERS = {
    "ddpm": NamedSampler("DDPMScheduler", "DDPM"),
    "ddim": NamedSampler("DDIMScheduler", "DDIM"),
    "euler": NamedSampler("EulerDiscreteScheduler", "Euler", pipeline="dpm-solver"),
    "euler-ancestral": NamedSampler("EulerAncestralDiscreteScheduler", "ancestral Euler", pipeline="ddpm"),
    "dpm-solver": NamedSampler("DPMSolverMultistepScheduler", "first-order DPM-Solver"),
    "flow-euler": NamedSampler("FlowMatchEulerDiscreteScheduler", "flow Euler", flow=True),
    "flow-memoryless": NamedSampler("DPMSolverMultistepScheduler", "memoryless flow", flow=True),
}


def default_sampler(scheduler: Any) -> str:
    """The memoryless sampler for a checkpoint's scheduler: "ddpm", or "flow-memoryless" for flow models.

    Raises:
        InvalidInputError: the scheduler is neither of a diffusion model nor of a flow model.
    """
    if is_flow(scheduler):
        return "flow-memoryless"
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return "ddpm"
    raise InvalidInputError(
        f"scheduler: {type(scheduler).__name__} has neither alphas_cumprod nor flow times, so no named sampler fits "
        "its model; read its own table with read_table."
    )


def scheduler_for(
    scheduler: Any, sampler: str | None = None, *, clip: bool | None = None, spacing: str = "trailing"
) -> Any:
    """A new scheduler with the noise schedule and prediction type of `scheduler`, which is not changed.

    Args:
        scheduler: a diffusers scheduler, usually the checkpoint's own.
        sampler: one of `NAMED_SAMPLERS`, or None for the class of `scheduler`. "dpm-solver" keeps the algorithm of a
            checkpoint that has a DPM-Solver, and is sde-dpmsolver++ for others, because fine-tuning needs noise.
        clip: False switches both `clip_sample` and `thresholding` off (needed by `read_table`), True switches
            `clip_sample` on, None keeps both as they are. A model may be meant to be sampled with clipping: without it
            the samples may change, so compare them.
        spacing: of the timesteps of diffusion models. The default "trailing" starts at the noisiest timestep, where x
            is (nearly) the N(0, I) that the chain starts from; "leading", the default of diffusers, starts up to T/N
            timesteps below it (Lin et al., arXiv 2305.08891). With a named sampler these are the timesteps, without
            Karras or other σ-spacings. Flow schedulers keep their own shift and σ-spacing.

    Raises:
        InvalidInputError: an unknown sampler or spacing; a sampler for flow models where the model is a diffusion
            model, or the other way round; clipping that the sampler does not have.
        MissingExtraError: diffusers is not installed.
    """
    require("diffusers")
    import diffusers

    check_scheduler(scheduler)
    if sampler is not None:
        check_choice("sampler", sampler, NAMED_SAMPLERS)
    if clip is not None:
        check_type("clip", clip, bool, "use True or False, or None to keep clipping as it is")
    check_choice("spacing", spacing, SPACINGS)
    scheduler_class = type(scheduler)
    if sampler is not None:
        check_sampler_fits(scheduler, sampler)
        unusual = sampler == "flow-memoryless" and any(scheduler.config.get(option) for option in UNUSUAL_FLOWS)
        scheduler_class = getattr(diffusers, NAMED_SAMPLERS["flow-euler" if unusual else sampler].scheduler)
    known = inspect.signature(scheduler_class.__init__).parameters
    options = {"timestep_spacing": spacing} | _clipping(scheduler, scheduler_class.__name__, known, clip)
    if sampler is not None:
        options |= _options(scheduler, sampler)
    # Not `from_config`, which also stores options that the new class does not have, and hands them on.
    return scheduler_class(**{key: value for key, value in (dict(scheduler.config) | options).items() if key in known})


def check_sampler_fits(scheduler: Any, sampler: str) -> None:
    """Raise `InvalidInputError` where one of sampler and scheduler is for flow models and the other is not."""
    flow = default_sampler(scheduler) == "flow-memoryless"
    if NAMED_SAMPLERS[sampler].flow == flow:
        return
    name = type(scheduler).__name__
    fitting = ", ".join(other for other in NAMED_SAMPLERS if NAMED_SAMPLERS[other].flow == flow)
    if flow:
        raise InvalidInputError(
            f"sampler: {sampler!r} is for diffusion models, and this is a flow model ({name}): its network predicts "
            f"noise − data on straight paths; use one of {fitting}."
        )
    raise InvalidInputError(
        f"sampler: {sampler!r} is for flow models, and this is a diffusion model ({name}, which predicts "
        f"{scheduler.config.get('prediction_type')}); use one of {fitting}."
    )


def _clipping(scheduler: Any, name: str, known: Any, clip: bool | None) -> dict[str, Any]:
    """`clip_sample` and `thresholding` of the new scheduler: neither is switched on or off unless asked for."""
    config = scheduler.config
    for option in ("clip_sample", "thresholding"):
        asked = clip if option == "clip_sample" and clip is not None else config.get(option, False) and clip is None
        if asked and option not in known:
            raise InvalidInputError(
                f"sampler: the checkpoint is sampled with {option}=True, which {name} does not have; switch that off "
                "with `clip=False`, or use ddpm or ddim."
            )
    if clip is None:
        return {option: config.get(option, False) for option in ("clip_sample", "thresholding")}
    return {"clip_sample": clip} | ({} if clip else {"thresholding": False})


def _options(scheduler: Any, sampler: str) -> dict[str, Any]:
    """Options of the scheduler that a named sampler needs."""
    config = scheduler.config
    if NAMED_SAMPLERS[sampler].flow:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        sde = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return {"shift": shift} | (sde | flow if sampler == "flow-memoryless" else {})
    if sampler == "euler-ancestral" and config.get("prediction_type") == "sample":
        raise InvalidInputError(
            "sampler: diffusers' ancestral Euler has no prediction_type='sample'; use ddpm, which is the same chain."
        )
    options: dict[str, Any] = dict.fromkeys(SIGMA_SPACINGS, False) | {"final_sigmas_type": "zero"}
    if sampler == "ddpm" and not config.get("variance_type"):
        options["variance_type"] = "fixed_small"
    if sampler == "dpm-solver":
        algorithm = config.get("algorithm_type", "sde-dpmsolver++")
        learned = config.get("variance_type") if "learned" in str(config.get("variance_type")) else None
        options |= {"solver_order": 1, "algorithm_type": algorithm, "variance_type": learned}
        options["final_sigmas_type"] = "zero" if algorithm.endswith("++") else "sigma_min"
    return options


def table_for(scheduler: Any, sampler: str, num_steps: int, *, eta: float = 1.0) -> ChainTable:
    """The chain of a named sampler, in the network's own scale, where equal samplers have equal x_0 and rows.

    Euler's σ-parameterised states are the same sampler with numbers up to the largest σ, and with another drift
    penalty, which unlike the path KL depends on the scale of the states.

    Args:
        scheduler: from `scheduler_for(…, sampler)`.
        sampler: one of `NAMED_SAMPLERS`.
        num_steps: N.
        eta: noise of DDIM; the other samplers ignore it.

    Raises:
        InvalidInputError: as `read_table` and `memoryless_flow` do.
    """
    check_scheduler(scheduler)
    check_choice("sampler", sampler, NAMED_SAMPLERS)
    eta = check_number("eta", eta, 0, closed=True)
    if sampler == "flow-memoryless" and type(scheduler).__name__ == NAMED_SAMPLERS["flow-euler"].scheduler:
        return memoryless_flow(scheduler, num_steps)
    return read_table(scheduler, num_steps, **({"eta": eta} if sampler == "ddim" else {})).unscaled()


def pipeline_for(scheduler: Any, sampler: str) -> tuple[Any, str]:
    """The scheduler with which a pipeline of diffusers samples the same chain, and the name of its sampler.

    A memoryless flow with an unusual σ-spacing gets the ODE instead; `ChainTable.agrees_with` says whether two tables
    are the same chain. Euler is not saved as DDIM, because that steps from t to t − T//N in diffusers, which differs
    from the time of the next row unless N divides T.

    Args:
        scheduler: from `scheduler_for(…, sampler)`, without clipping.
        sampler: one of `NAMED_SAMPLERS`.

    Raises:
        InvalidInputError: an unknown sampler.
    """
    check_choice("sampler", sampler, NAMED_SAMPLERS)
    other = NAMED_SAMPLERS[sampler].pipeline
    if sampler == "flow-memoryless" and type(scheduler).__name__ == NAMED_SAMPLERS["flow-euler"].scheduler:
        return scheduler, "flow-euler"
    if not other:
        return scheduler, sampler
    spacing = scheduler.config.get("timestep_spacing", "trailing")
    saved = scheduler_for(scheduler, other, clip=False, spacing=spacing)
    if sampler == "euler":
        saved.register_to_config(algorithm_type="dpmsolver++")  # no noise
    return saved, other


def clipped_for(scheduler: Any, sampler: str, *, noisy: bool, eta: float = 1.0) -> tuple[Any, dict[str, float]]:
    """The same sampler with clipping switched on: a scheduler, and the options of its step.

    Only DDPM and DDIM clip; every other sampler is one of these two in other coordinates.

    Args:
        scheduler: the checkpoint's own, of a diffusion model.
        sampler: one of `NAMED_SAMPLERS`.
        noisy: whether the chain has noise.
        eta: noise of DDIM.
    """
    twin = sampler if sampler in ("ddpm", "ddim") else "ddpm" if noisy else "ddim"
    options = {"eta": eta if sampler == "ddim" else 0.0} if twin == "ddim" else {}
    return scheduler_for(scheduler, twin, clip=True), options
