"""Shallow copies of a pipeline with stand-ins for some of its parts, and calls of them that end early."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError
from implicit_diffusion.files.reading import one_line

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")  # samples of a call, by pipeline


class Enough(Exception):  # noqa: N818 - no error
    """Ends the run of a pipeline from within, when all that is needed has been seen."""


def batch_of(pipeline: Any, call: Mapping[str, Any], prompts: list[str] | None, count: int) -> dict[str, Any]:
    """The arguments with which a pipeline draws `count` samples: of the first prompt, class, or given embedding."""
    known = inspect.signature(type(pipeline).__call__).parameters
    if prompts is not None:
        negative = call.get("negative_prompt")
        each = {"negative_prompt": [negative[0]] * count} if isinstance(negative, list) else {}
        return {"prompt": [prompts[0]] * count, **each}
    if "class_labels" in call:
        return {"class_labels": [call["class_labels"][0]] * count}
    argument = next((name for name in COUNTS if name in known), None)
    if argument is None:
        raise InvalidInputError(
            f"pipeline: {type(pipeline).__name__} has none of {', '.join(COUNTS)}, so that it cannot be called for "
            "several samples; give prompts"
        )
    return {argument: count}


def stand_in_for(network: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A shallow copy of a network with another forward pass: of the same class, with the same config and weights."""

    @functools.wraps(network.forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    copied = copy.copy(network)
    copied.__dict__["forward"] = called
    return copied


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes: its weights are elsewhere if they are offloaded, or if it has none (`hollow`)."""
    offloaded = getattr(network.__dict__.get("_hf_hook"), "execution_device", None)
    return next(network.parameters()).device if offloaded is None else torch.device(offloaded)


def shadow_of(pipeline: Any, replaced: Mapping[str, Any], device: torch.device) -> Any:
    """A shallow copy of a pipeline, silent, with other parts, that computes on `device`.

    The pipeline itself does not notice, and may have parts that are elsewhere, or have no memory at all.
    """
    copied = copy.copy(pipeline)
    own = type(pipeline)
    placed = dict.fromkeys(("device", "_execution_device"), property(lambda shadow: device))
    copied.__class__ = type(own.__name__, (own,), {**placed, "__module__": own.__module__})
    copied.__dict__.update(replaced)
    copied.__dict__["_progress_bar_config"] = {"disable": True}
    return copied


def run_until_enough(pipeline: Any, options: Mapping[str, Any], argument: str) -> Any:
    """Call a pipeline without its own no_grad; what it returns, or None where a stand-in ended the run.

    Raises:
        InvalidInputError: the call fails; the message begins with `argument`.
    """
    call = inspect.unwrap(type(pipeline).__call__)
    try:
        return call(pipeline, **options)
    except Enough:
        return None
    except (ImplicitDiffusionError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # pipelines raise many
        given = ", ".join(f"{name}=…" for name in options)
        raise InvalidInputError(
            f"{argument}: {type(pipeline).__name__}({given}) fails: {type(error).__name__}: {one_line(error)}"
        ) from error
