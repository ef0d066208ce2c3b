"""Kinds of chains by name, and which of diffusers' pipelines samples them.

    scheduler_for(checkpoint's scheduler, "ddpm", clip=False)  →  a scheduler with the same noise schedule
    table_for(scheduler, "ddpm", 10)                           →  its chain
    pipeline_for(scheduler, "euler")                           →  what a folder must hold to sample the same

A diffusion model (one with `alphas_cumprod`) and a flow model speak of different quantities, so each has kinds of its
own. The unconditional pipelines of diffusers start at N(0, I) and do not scale the network's input. Two kinds do not
live on that scale, but the same sampler has another name there (`ChainTable.unscaled`): Euler is the first-order
DPM-Solver++ (and DDIM without noise), ancestral Euler is DDPM.

The memoryless flow is run by DPMSolverMultistepScheduler (first order, sde-dpmsolver++, flow sigmas): the rows of
`memoryless_flow` at noise levels from 1 − 1/T instead of 1, with times rounded down to integers. It has a fixed shift
only. A flow scheduler with another σ-spacing takes `memoryless_flow` itself, which no pipeline runs; the folder then
integrates the ODE of the same network, and a run says so.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_number, check_type, shown
from implicit_diffusion.tables.flow import is_flow, memoryless_flow
from implicit_diffusion.tables.refusals import check_scheduler
from implicit_diffusion.tables.scheduler import read_table
from implicit_diffusion.tables.table import ChainTable

SPACINGS = ("trailing", "leading", "linspace")
SIGMA_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
UNUSUAL_FLOWS = (*SIGMA_SPACINGS, "use_dynamic_shifting", "shift_terminal", "invert_sigmas")


@dataclass(frozen=True)
class Kind:
    """A kind of chain.

    Args:
        scheduler: its class in diffusers.
        words: for reports.
        flow: whether it is for flow models, and not for diffusion models.
        pipeline: the kind whose scheduler a pipeline runs for it; empty for its own.
    """

    scheduler: str
    words: str
    flow: bool = False
    pipeline: str = ""


KINDS = {
    "ddpm": Kind("DDPMScheduler", "DDPM"),
    "ddim": Kind("DDIMScheduler", "DDIM"),
    "euler": Kind("EulerDiscreteScheduler", "Euler", pipeline="dpm-solver"),
    "euler-ancestral": Kind("EulerAncestralDiscreteScheduler", "ancestral Euler", pipeline="ddpm"),
    "dpm-solver": Kind("DPMSolverMultistepScheduler", "first-order DPM-Solver"),
    "flow-euler": Kind("FlowMatchEulerDiscreteScheduler", "flow Euler", flow=True),
    "flow-memoryless": Kind("DPMSolverMultistepScheduler", "memoryless flow", flow=True),
}


def default_kind(scheduler: Any) -> str:
    """The memoryless kind of a checkpoint's scheduler: "ddpm", or "flow-memoryless" for flow models.

    Raises:
        InvalidInputError: the scheduler is of neither family.
    """
    if is_flow(scheduler):
        return "flow-memoryless"
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return "ddpm"
    raise InvalidInputError(
        f"scheduler: {type(scheduler).__name__} has neither alphas_cumprod nor flow times, so the kinds of chains that "
        "are known here do not fit its model; read its own table with read_table."
    )


def scheduler_for(
    scheduler: Any, kind: str | None = None, *, clip: bool | None = None, spacing: str = "trailing"
) -> Any:
    """A fresh scheduler with the noise schedule and prediction type of `scheduler`; the original is untouched.

    Args:
        scheduler: a diffusers scheduler, usually the checkpoint's own.
        kind: one of `KINDS`, or None for the class of `scheduler`. "dpm-solver" keeps the algorithm of a checkpoint
            that has a DPM-Solver, and is sde-dpmsolver++ for others: fine-tuning wants noise.
        clip: False switches both `clip_sample` and `thresholding` off (needed by `read_table`), True switches
            `clip_sample` on, None keeps both as they are. Clipping is part of how a model was meant to be sampled:
            without it the samples may change, so compare them.
        spacing: of the timesteps of diffusion models. The default "trailing" starts at the noisiest timestep, where x
            is (nearly) the N(0, I) that the chain starts from; "leading", the default of diffusers, starts up to T/N
            timesteps below (Lin et al., arXiv 2305.08891). A kind given by name takes these timesteps, without Karras
            or other σ-spacings. Flow schedulers keep their own shift and σ-spacing.

    Raises:
        InvalidInputError: unknown kind or spacing; a kind of the other family; clipping that the kind does not have.
    """
    import diffusers

    check_scheduler(scheduler)
    if kind is not None and (not isinstance(kind, str) or kind not in KINDS):
        raise InvalidInputError(f"scheduler: unknown kind {shown(kind)}; take one of {', '.join(KINDS)}.")
    if clip is not None:
        check_type("clip", clip, bool, "take True or False, or None to keep clipping as it is")
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        raise InvalidInputError(f"spacing: unknown {shown(spacing)}; take one of {', '.join(SPACINGS)}.")
    scheduler_class = type(scheduler)
    if kind is not None:
        check_family(scheduler, kind)
        unusual = kind == "flow-memoryless" and any(scheduler.config.get(option) for option in UNUSUAL_FLOWS)
        scheduler_class = getattr(diffusers, KINDS["flow-euler" if unusual else kind].scheduler)
    known = inspect.signature(scheduler_class.__init__).parameters
    options = {"timestep_spacing": spacing} | _clipping(scheduler, scheduler_class.__name__, known, clip)
    if kind is not None:
        options |= _options(scheduler, kind)
    # Not `from_config`, which carries options that the new class does not have along and back.
    return scheduler_class(**{key: value for key, value in (dict(scheduler.config) | options).items() if key in known})


def check_family(scheduler: Any, kind: str) -> None:
    """Raise `InvalidInputError` unless `kind` fits the family of the checkpoint's scheduler."""
    flow = default_kind(scheduler) == "flow-memoryless"
    if KINDS[kind].flow == flow:
        return
    name = type(scheduler).__name__
    fitting = ", ".join(other for other in KINDS if KINDS[other].flow == flow)
    if flow:
        raise InvalidInputError(
            f"scheduler: {kind!r} is for diffusion models, and this is a flow model ({name}): its network predicts "
            f"noise − data on straight paths; take one of {fitting}."
        )
    raise InvalidInputError(
        f"scheduler: {kind!r} is for flow models, and this is a diffusion model ({name}, which predicts "
        f"{scheduler.config.get('prediction_type')}); take one of {fitting}."
    )


def _clipping(scheduler: Any, name: str, known: Any, clip: bool | None) -> dict[str, Any]:
    """`clip_sample` and `thresholding` of the new scheduler, so that none appears or disappears unasked."""
    config = scheduler.config
    for option in ("clip_sample", "thresholding"):
        asked = clip if option == "clip_sample" and clip is not None else config.get(option, False) and clip is None
        if asked and option not in known:
            raise InvalidInputError(
                f"scheduler: the checkpoint is sampled with {option}=True, which {name} does not have; say that it may "
                "go (`clip=False`), or use ddpm or ddim."
            )
    if clip is None:
        return {option: config.get(option, False) for option in ("clip_sample", "thresholding")}
    return {"clip_sample": clip} | ({} if clip else {"thresholding": False})


def _options(scheduler: Any, kind: str) -> dict[str, Any]:
    """What a kind asks for, beyond its class."""
    config = scheduler.config
    if KINDS[kind].flow:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        sde = {"solver_order": 1, "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return {"shift": shift} | (sde | flow if kind == "flow-memoryless" else {})
    if kind == "euler-ancestral" and config.get("prediction_type") == "sample":
        raise InvalidInputError(
            "scheduler: diffusers' ancestral Euler has no prediction_type='sample'; take ddpm, which is the same chain."
        )
    options: dict[str, Any] = dict.fromkeys(SIGMA_SPACINGS, False) | {"final_sigmas_type": "zero"}
    if kind == "ddpm" and not config.get("variance_type"):
        options["variance_type"] = "fixed_small"
    if kind == "dpm-solver":
        algorithm = config.get("algorithm_type", "sde-dpmsolver++")
        learned = config.get("variance_type") if "learned" in str(config.get("variance_type")) else None
        options |= {"solver_order": 1, "algorithm_type": algorithm, "variance_type": learned}
        options["final_sigmas_type"] = "zero" if algorithm.endswith("++") else "sigma_min"
    return options


def table_for(scheduler: Any, kind: str, num_steps: int, *, eta: float = 1.0) -> ChainTable:
    """The chain of a kind, in the network's own scale: the same x_0 and coefficients whichever name a sampler has.

    Euler's σ-parameterised states would be the same sampler with numbers up to the largest σ, and with another drift
    penalty, which unlike the path KL depends on the scale of the states.

    Args:
        scheduler: from `scheduler_for(…, kind)`.
        kind: one of `KINDS`.
        num_steps: N.
        eta: noise of DDIM; the other kinds ignore it.

    Raises:
        InvalidInputError: as `read_table` and `memoryless_flow` do.
    """
    check_scheduler(scheduler)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidInputError(f"scheduler: unknown kind {shown(kind)}; take one of {', '.join(KINDS)}.")
    eta = check_number("eta", eta, 0, closed=True)
    if kind == "flow-memoryless" and type(scheduler).__name__ == KINDS["flow-euler"].scheduler:
        return memoryless_flow(scheduler, num_steps)
    return read_table(scheduler, num_steps, **({"eta": eta} if kind == "ddim" else {})).unscaled()


def pipeline_for(scheduler: Any, kind: str) -> tuple[Any, str]:
    """The scheduler that a pipeline of diffusers needs to sample the chain of `kind`, and its kind.

    Whether it samples the same chain, `ChainTable.agrees_with` tells: a memoryless flow with an unusual σ-spacing gets
    the ODE instead. Euler is not saved as DDIM, which in diffusers steps from t to t − T//N, and that is not quite
    where its next row stands unless N divides T.

    Args:
        scheduler: from `scheduler_for(…, kind)`, without clipping.
        kind: one of `KINDS`.
    """
    other = KINDS[kind].pipeline
    if kind == "flow-memoryless" and type(scheduler).__name__ == KINDS["flow-euler"].scheduler:
        return scheduler, "flow-euler"
    if not other:
        return scheduler, kind
    spacing = scheduler.config.get("timestep_spacing", "trailing")
    saved = scheduler_for(scheduler, other, clip=False, spacing=spacing)
    if kind == "euler":
        saved.register_to_config(algorithm_type="dpmsolver++")  # no noise
    return saved, other


def clipped_for(scheduler: Any, kind: str, *, noisy: bool, eta: float = 1.0) -> tuple[Any, dict[str, float]]:
    """What the chain of `kind` was before clipping was switched off: a scheduler that clips, and its step's options.

    Only DDPM and DDIM clip; the other kinds are one of them in other coordinates.

    Args:
        scheduler: the checkpoint's own, of a diffusion model.
        kind: one of `KINDS`.
        noisy: whether the chain has noise.
        eta: noise of DDIM.
    """
    twin = kind if kind in ("ddpm", "ddim") else "ddpm" if noisy else "ddim"
    options = {"eta": eta if kind == "ddim" else 0.0} if twin == "ddim" else {}
    return scheduler_for(scheduler, twin, clip=True), options
