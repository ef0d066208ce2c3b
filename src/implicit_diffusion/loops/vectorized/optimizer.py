"""One optimizer for the stacked parameters of several runs, where its step is elementwise.

The entries of SGD, Adam and their kin do not look at each other: the step on stacked parameters makes the step of every
run. Whether an optimizer is of that kind is tried, on gradients of very different sizes in two runs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops.vectorized.stack import ONE_BY_ONE
from implicit_diffusion.noise import Noise

PROBED = 0.01  # learning rate of the trial


def stacked_optimizer(optimizers: Sequence[torch.optim.Optimizer], stacked: Sequence[Tensor]) -> torch.optim.Optimizer:
    """An optimizer of the stacked parameters that continues from the runs' own.

    Args:
        optimizers: of the runs, alike but for their numbers.
        stacked: for every parameter, in their order, those of all runs.

    Raises:
        InvalidInputError: settings or counts that differ between runs; a step that is not elementwise.
    """
    first = optimizers[0]
    check_settings(optimizers)
    check_elementwise(first)
    memo = {id(p): q for p, q in zip(_parameters(first), stacked, strict=True)}
    whole = copy.deepcopy(first, memo)
    for i, q in enumerate(stacked):
        states = [optimizer.state.get(_parameters(optimizer)[i], {}) for optimizer in optimizers]
        if states[0]:
            whole.state[q] = {key: _stacked_value(key, [state.get(key) for state in states], q) for key in states[0]}
    return whole


def hand_back(whole: torch.optim.Optimizer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Give every run's optimizer its part of the state of the one for all."""
    for i, q in enumerate(_parameters(whole)):
        for s, optimizer in enumerate(optimizers):
            if q in whole.state:
                p = _parameters(optimizer)[i]
                optimizer.state[p] = {key: _own_value(value, s, q) for key, value in whole.state[q].items()}


def check_settings(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise `InvalidInputError` where settings such as the learning rate differ between runs."""
    for optimizer in optimizers[1:]:
        for one, other in zip(optimizers[0].param_groups, optimizer.param_groups, strict=True):
            for name in one.keys() - {"params"}:
                if one[name] != other.get(name):
                    raise InvalidInputError(
                        f"the optimizers of several runs at once must have the same settings, got {name}={one[name]} "
                        f"and {name}={other.get(name)}; use one, or {ONE_BY_ONE}"
                    )


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raise `InvalidInputError` unless the step on two runs' stacked parameters is the step of each."""
    name = type(optimizer).__name__
    generator = Noise(0).generator()
    runs = [_trial(optimizer, [p.detach().clone() for p in _parameters(optimizer)]) for _ in range(2)]
    both = _trial(optimizer, [torch.stack([p.detach()] * 2) for p in _parameters(optimizer)])
    try:
        for _ in range(2):
            for i, q in enumerate(_parameters(both)):
                numbers = torch.randn(q.shape, generator=generator).to(q)
                q.grad = torch.stack([numbers[0], 100 * numbers[1]])
                for s, run in enumerate(runs):
                    _parameters(run)[i].grad = q.grad[s].clone()
            for each in (both, *runs):
                each.step()
    except (RuntimeError, ValueError, IndexError) as error:
        raise InvalidInputError(f"{name} takes no stacked parameters ({error}); {ONE_BY_ONE}") from error
    for i, q in enumerate(_parameters(both)):
        own = torch.stack([_parameters(run)[i].detach() for run in runs])
        if not torch.allclose(q.detach(), own, rtol=1e-3 if q.element_size() < 4 else 1e-5, atol=1e-6 * PROBED):
            raise InvalidInputError(
                f"{name} is not elementwise: its step on several runs at once is not the step of each; {ONE_BY_ONE}, "
                "or use SGD or Adam"
            )


def _trial(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Any:
    """A copy without a state that moves other parameters."""
    own = [p.requires_grad_() for p in parameters]
    memo: dict[int, Any] = {id(p): q for p, q in zip(_parameters(optimizer), own, strict=True)}
    trial = copy.deepcopy(optimizer, memo)
    trial.state.clear()
    for group in trial.param_groups:
        group["lr"] = torch.full_like(group["lr"], PROBED) if isinstance(group["lr"], Tensor) else PROBED
    return trial


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _stacked_value(key: str, values: Sequence[Any], q: Tensor) -> Any:
    """An entry of the runs' states as one for all."""
    first = values[0]
    if isinstance(first, Tensor) and first.shape == q.shape[1:] and key != "step":
        return torch.stack(list(values))
    same = torch.equal if isinstance(first, Tensor) else lambda a, b: a == b
    if not all(same(first, value) for value in values[1:]):
        raise InvalidInputError(f"the optimizers of the runs differ in {key}; {ONE_BY_ONE}")
    return copy.deepcopy(first)


def _own_value(value: Any, s: int, q: Tensor) -> Any:
    return value[s].clone() if isinstance(value, Tensor) and value.shape == q.shape else copy.deepcopy(value)
