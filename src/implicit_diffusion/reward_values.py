"""Arguments and results of reward functions: one number per sample, in any of the usual forms.

Reward libraries return columns of shape (n, 1), dicts of scores, pairs (scores, info), lists of numbers or NumPy
arrays. The form is recognised by type, never by the number of samples, so that a form that is accepted in the first
check is accepted in every batch. Other entries of a pair or a dict are ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError

KEYS = ("reward", "rewards", "score", "scores")  # of a dict of scores, in this order
CONDITION_NAMES = {
    "prompt",
    "prompts",
    "caption",
    "captions",
    "text",
    "texts",
    "label",
    "labels",
    "class_labels",
    "condition",
}


def scores_of(returned: Any, x: Float[Tensor, "n *event"]) -> Shaped[Tensor, " n"]:
    """The rewards in the result of a reward function for samples x.

    The result may be a tensor or NumPy array of n numbers along one of its dimensions, (n,), (n, 1) or (1, n); a list
    of n numbers or of tensors that hold one; a pair (scores, info) whose info is a dict, or None; a dict with one of
    `KEYS`, or with a single entry that is a tensor or an array. Tensors keep their gradient history, dtype and device;
    other numbers become a tensor with the dtype and device of x.

    Raises:
        InvalidInputError: any other result.
    """
    values = _tensor(_chosen(returned), x)
    if values is None or values.numel() != len(x) or values.ndim - sum(size == 1 for size in values.shape) > 1:
        raise InvalidInputError(
            f"reward must return one number per sample, shape ({len(x)},) for input {tuple(x.shape)}, "
            f"got {_given(returned, values)}"
        )
    return values.reshape(len(x))  # a view


def takes_condition(function: Callable[..., Any]) -> bool:
    """Whether a reward function has a second required argument: what its samples were sampled under.

    Raises:
        InvalidInputError: it has more than two required arguments, one that is keyword-only, or the samples second.
    """
    try:
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    except (TypeError, ValueError):  # built-in functions may have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind not in UNNAMED]
    given = [p.name for p in required if p.kind in positional]
    named = [p.name for p in required if p.kind not in positional]
    if len(given) > 2 or named:
        raise InvalidInputError(
            "reward must have one required argument, the samples (images), or two, the samples and what they were "
            f"sampled under (prompts, class labels), got {'one' if len(required) == 1 else 'a function'} of "
            f"{', '.join([*given, *(f'{name}=…' for name in named)])}; give the others defaults"
            + ", and let the samples come by position"
            * bool(named)
        )
    if len(given) == 2 and given[0] in CONDITION_NAMES and given[1] not in CONDITION_NAMES:
        raise InvalidInputError(
            f"reward is called with the samples first and what they were sampled under second, but its arguments are "
            f"({', '.join(given)}); exchange them"
        )
    return len(given) == 2


UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _chosen(returned: Any) -> Any:
    """The scores in a pair or a dict; any other result unchanged."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2 and isinstance(returned[1], (Mapping, type(None))):
        return returned[0]
    if not isinstance(returned, Mapping):
        return returned
    for key in KEYS:
        if key in returned:
            return returned[key]
    numbers = [value for value in returned.values() if isinstance(value, (Tensor, np.ndarray))]
    if len(numbers) == 1:
        return numbers[0]
    keys = ", ".join(map(repr, returned))
    raise InvalidInputError(
        f"reward returned a dict {f'with the keys {keys}' if keys else 'of nothing'}, which does not say what to "
        f"maximise; name the scores {KEYS[0]!r} in it, or return them alone"
    )


def _tensor(scores: Any, x: Tensor) -> Tensor | None:
    """Numbers as a tensor; None for other values."""
    if isinstance(scores, Tensor):
        return scores
    if isinstance(scores, (list, tuple)) and scores:
        if all(isinstance(score, Tensor) and score.numel() == 1 for score in scores):
            return torch.stack([score.reshape(()) for score in scores])
        if not all(isinstance(score, (Real, np.generic, np.ndarray)) for score in scores):
            return None
        scores = np.asarray(scores) if len({np.shape(score) for score in scores}) == 1 else None
    if isinstance(scores, Real) or (isinstance(scores, np.ndarray) and scores.dtype.kind in "fiub"):
        return torch.as_tensor(np.array(scores, dtype=np.float64), dtype=x.dtype, device=x.device)
    return None


def _given(returned: Any, values: Tensor | None) -> str:
    """Describe what was returned instead, and what would work."""
    scores = _chosen(returned)
    of = "" if scores is returned else f" in a {type(returned).__name__}"
    if scores is None and not of:
        return "None; end it with return"
    if callable(scores):
        return (
            f"{type(scores).__name__}{of}; call a function that makes a reward: FILE.py:make() on the command line, "
            "Reward(make()) in Python"
        )
    if values is None:
        return f"{_kind(scores)}{of}; return a tensor with that shape, or a pair (scores, info) whose info is a dict"
    given = f"{tuple(values.shape)}{of}" if isinstance(scores, Tensor) else f"{_kind(scores)}{of}"
    if values.numel() == 1:
        return (
            f"{given}, one number for all samples; average within each sample alone, as x.flatten(1).mean(1) does, and "
            'call metrics that average over their batch with reduction="none"'
        )
    return f"{given}; average over all dimensions but the first, as .flatten(1).mean(1) does"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"ndarray of {value.dtype} with shape {value.shape}"
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(element).__name__ for element in value})
        return f"{type(value).__name__} of {len(value)}" + f" ({', '.join(kinds)})" * bool(kinds)
    return type(value).__name__
