"""What `read_table` refuses before probing, because its effect is known; each message says what to use instead."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from implicit_diffusion.errors import InvalidInputError, NonAffineError, check_integer, check_number, shown

GIVEN_BY_THE_CHAIN = ("model_output", "timestep", "sample", "generator", "variance_noise", "return_dict")


def check_scheduler(scheduler: Any) -> None:
    """Raise `InvalidInputError` unless `scheduler` has the interface of a diffusers scheduler."""
    if isinstance(scheduler, type) or not all(hasattr(scheduler, name) for name in ("config", "set_timesteps", "step")):
        raise InvalidInputError(
            f"scheduler must be a diffusers scheduler, got {shown(scheduler)}; use one such as DDPMScheduler()."
        )


def check_num_steps(scheduler: Any, num_steps: Any) -> int:
    """The number; raises `InvalidInputError` unless 1 ≤ num_steps ≤ the number of training timesteps."""
    num_steps = check_integer("num_steps", num_steps)
    limit = scheduler.config.get("num_train_timesteps", num_steps)
    if num_steps > limit:
        raise InvalidInputError(
            f"num_steps must be at most the {limit} timesteps that the model was trained on, got {num_steps}"
        )
    return num_steps


def check_step_options(scheduler: Any, step_options: Mapping[str, Any]) -> None:
    """Raise `InvalidInputError` (or `NonAffineError`) for options that `scheduler.step` lacks or that are refused."""
    known = [p for p in inspect.signature(scheduler.step).parameters if p not in GIVEN_BY_THE_CHAIN]
    name = type(scheduler).__name__
    for option, value in step_options.items():
        if option in GIVEN_BY_THE_CHAIN:
            raise InvalidInputError(f"step option {option!r} is given by the chain itself; leave it out.")
        if option not in known:
            raise InvalidInputError(
                f"{name}.step has no option {option!r}; it has {', '.join(known) if known else 'no options'}."
            )
        if option == "use_clipped_model_output" and value:
            raise NonAffineError(
                "use_clipped_model_output=True recomputes the noise from a clipped x_0, and no table "
                "expresses clipping; leave it out, it has no effect with clip_sample=False."
            )
        if option == "s_churn" and value:
            raise InvalidInputError(
                f"s_churn={value}: {name} adds this noise after the network has looked at the state, or ignores the "
                "option, whereas the algorithm that it is named after (Karras et al., arXiv 2206.00364, algorithm 2) "
                "shows the network the noised state: its samples are not the model's. For a chain with noise use "
                "EulerAncestralDiscreteScheduler, or `memoryless_flow` for a flow model."
            )
        if option == "per_token_timesteps" and value is not None:
            raise InvalidInputError(
                "per_token_timesteps gives every token a time of its own, and a row of a table has one time; leave it "
                "out."
            )


def refuse_what_is_no_table(scheduler: Any) -> None:
    """Raise `NonAffineError` or `InvalidInputError` for options of the scheduler's config."""
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("thresholding"):
        raise NonAffineError(
            "thresholding=True rescales each sample by a quantile of itself, which no table can express; "
            "build the scheduler with `thresholding=False`."
        )
    if config.get("clip_sample"):
        raise NonAffineError(
            "clip_sample=True clamps the predicted x_0, which no table can express; build the scheduler with "
            "`clip_sample=False`. This may change the pretrained samples: look at them."
        )
    variance = config.get("variance_type")
    if variance in ("learned", "learned_range"):
        raise NonAffineError(
            f"variance_type={variance!r}: the network sets the noise of each step, so that s_k is not a number in a "
            "table; use 'fixed_small' or 'fixed_large' with a network that predicts no variance."
        )
    if variance == "fixed_large_log":
        raise NonAffineError(
            "variance_type='fixed_large_log' does not work in diffusers: its step takes the square root of "
            "log β_t, a negative number, and returns NaN; use 'fixed_large', which is the same variance."
        )
    if (order := config.get("solver_order", 1)) > 1:
        raise NonAffineError(
            f"solver_order={order}: from its second row on, {name} combines several network outputs, so that a step "
            "depends on what came before it and is not a row of a table, as for all multistep and second-order "
            "solvers. Use DPMSolverMultistepScheduler with solver_order=1, DDPMScheduler or DDIMScheduler."
        )


def check_shift(scheduler: Any, mu: float | None) -> None:
    """Raise `InvalidInputError` unless `mu` is given exactly where the timesteps are shifted dynamically."""
    config, name = scheduler.config, type(scheduler).__name__
    if mu is not None:
        mu = check_number("mu", mu)
    if config.get("use_dynamic_shifting") and mu is None:
        raise InvalidInputError(
            f"{name} with use_dynamic_shifting=True shifts its timesteps by the size of the image: give the exponent, "
            "read_table(scheduler, num_steps, mu=...), as your pipeline computes it, or build the scheduler with "
            "use_dynamic_shifting=False and a fixed shift."
        )
    if mu is not None and not config.get("use_dynamic_shifting"):
        raise InvalidInputError(
            f"mu={mu:g} needs a scheduler with use_dynamic_shifting=True, got {name} without; leave mu out."
        )


def wrong_number_of_timesteps(scheduler: Any, num_steps: int) -> str:
    """The message for a scheduler that does not make `num_steps` network calls."""
    name, count = type(scheduler).__name__, len(scheduler.timesteps)
    if scheduler.config.get("timestep_spacing") == "trailing" and count == num_steps + 1:
        return (
            f"{name} makes {count} timesteps for num_steps = {num_steps}: diffusers' trailing spacing rounds "
            "to one too many for this number and ends at t = −1. Use a number of steps that divides "
            f"{scheduler.config.num_train_timesteps}, or one nearby."
        )
    return (
        f"{name} makes {count} network calls for num_steps = {num_steps}, as second-order solvers do; a "
        "table has one call per row. Use DDPMScheduler or DDIMScheduler."
    )
