"""Results of reward functions: one number per sample, in any of the usual forms.

Reward libraries return columns of shape (n, 1), dicts of scores, pairs (scores, info), lists of numbers or NumPy
arrays. The form is recognised by type, never by the number of samples, so that a form that is accepted in the first
check is accepted in every batch. Other entries of a pair or a dict are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError

KEYS = ("reward", "rewards", "score", "scores")  # of a dict of scores, in this order


def scores_of(returned: Any, x: Float[Tensor, "n *event"]) -> Shaped[Tensor, " n"]:
    """The rewards in the result of a reward function for samples x.

    The result may be a tensor or NumPy array of n numbers along one of its dimensions, (n,), (n, 1) or (1, n); a list
    of n numbers or of tensors that hold one; a pair (scores, info) whose info is a dict, or None; a dict with one of
    `KEYS`, or with a single entry that is a tensor, an array or a list of numbers. Tensors keep their gradient history
    and dtype; other numbers become a tensor with the dtype of x. All end on the device of x.

    Raises:
        InvalidInputError: any other result.
    """
    values = _tensor(_chosen(returned), x)
    if values is None or values.numel() != len(x) or not _in_a_row(values):
        raise InvalidInputError(
            f"reward must return one number per sample, shape ({len(x)},) for input {tuple(x.shape)}, "
            f"got {_given(returned, values, len(x))}"
        )
    return values.reshape(len(x)).to(x.device)  # a view, where they are there


def _chosen(returned: Any) -> Any:
    """The scores in a pair or a dict; any other result unchanged."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2 and isinstance(returned[1], (Mapping, type(None))):
        return returned[0]
    if not isinstance(returned, Mapping):
        return returned
    for key in KEYS:
        if key in returned:
            return returned[key]
    numbers = [value for value in returned.values() if isinstance(value, (Tensor, np.ndarray)) or _are_numbers(value)]
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


def _in_a_row(values: Tensor) -> bool:
    return values.ndim - sum(size == 1 for size in values.shape) <= 1


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Real) for each in value)


def _given(returned: Any, values: Tensor | None, n: int) -> str:
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
        words = isinstance(scores, (list, tuple)) and any(isinstance(each, str) for each in scores)
        number = ", and words are no numbers: convert each, as float(answer) does" * words
        return (
            f"{_kind(scores)}{of}{number}; return a tensor with that shape, a list or an array of {n} numbers, or a "
            "pair (scores, info) whose info is a dict"
        )
    given = f"{tuple(values.shape)}{of}" if isinstance(scores, Tensor) else f"{_kind(scores)}{of}"
    if values.numel() == 1:
        return (
            f"{given}, one number for all samples; average within each sample alone, as x.flatten(1).mean(1) does, and "
            'call metrics that average over their batch with reduction="none"'
        )
    if _in_a_row(values):
        return f"{given}; return {n} numbers, one for each sample, in the order of the samples"
    return f"{given}; average over all dimensions but the first, as .flatten(1).mean(1) does"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"ndarray of {value.dtype} with shape {value.shape}"
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(element).__name__ for element in value})
        return f"{type(value).__name__} of {len(value)}" + f" ({', '.join(kinds)})" * bool(kinds)
    return type(value).__name__
