"""The optimizer of an update: what it must be, how a step is undone, and the message for one that failed.

An optimizer may turn a sound gradient into NaN: Adam's eps of 1e−8 is 0 in float16, and a gradient of zero gives 0/0.
So θ is checked after the step, through the one number that is read anyway, and restored unless it is finite.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, NonFiniteError, check_type
from implicit_diffusion.rounding import at_least_single

Schedule = torch.optim.lr_scheduler.LRScheduler


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise `InvalidInputError` for anything but a first-order optimizer of dense gradients."""
    check_type("update", optimizer, torch.optim.Optimizer, "use torch.optim.Adam(model.parameters()), for example")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise InvalidInputError("SparseAdam takes sparse gradients alone, and Γ is dense; use torch.optim.Adam")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InvalidInputError(
            f"optimizer {type(optimizer).__name__} needs a closure, which one gradient estimate cannot serve; "
            "use a first-order optimizer such as Adam or SGD"
        )


def check_schedule(schedule: Schedule, optimizer: torch.optim.Optimizer) -> None:
    """Raise `InvalidInputError` for a schedule that needs a metric, or belongs to another optimizer."""
    known = (Schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if not isinstance(schedule, known) and not hasattr(schedule, "step"):
        check_type("schedule", schedule, Schedule, "use CosineAnnealingLR(optimizer, updates), for example")
    try:
        inspect.signature(schedule.step).bind()
    except TypeError as error:
        raise InvalidInputError(
            f"schedule {type(schedule).__name__} does not step by itself ({error}); use one that does, "
            "such as CosineAnnealingLR"
        ) from error
    if getattr(schedule, "optimizer", optimizer) is not optimizer:
        raise InvalidInputError("schedule is that of another optimizer; build it around the one of this update")


def failed_step(optimizer: torch.optim.Optimizer, moved: Sequence[Tensor], count: int) -> str:
    """What an optimizer's own step made of θ, in words, with what would help.

    Args:
        optimizer: after the step.
        moved: the parameters that it moved; none where it is not known which.
        count: of the parameter tensors that it holds.
    """
    group = optimizer.param_groups[0]
    settings = ", ".join(f"{key}={group[key]:g}" for key in ("lr", "eps") if isinstance(group.get(key), float))
    bad = sum(not processes.own(p).isfinite().all() for p in moved)
    which = f"{bad} of {count} parameter tensors" if bad else "θ"
    eps = group.get("eps")
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"] if p.dtype.itemsize < 4}
    vanishing = [d for d in dtypes if isinstance(eps, float) and eps > 0 and not torch.tensor(eps, dtype=d)]
    advice = "use a smaller learning rate"
    if vanishing:
        advice = f"eps is 0 in {vanishing[0]}: use eps=1e-4, or float32 weights"
    if eps == 0:
        advice = "use a positive eps"
    return (
        f"the step of the optimizer, {type(optimizer).__name__}({settings}), made {which} NaN or infinite from a "
        f"finite gradient; {advice}"
    )


class Before:
    """θ and the optimizer's state as they are before a step, to be restored if it fails.

    Args:
        optimizer: whose state it is.
        moved: the parameters that the step moves.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer, moved: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self.entries = {p: dict(s) if isinstance(s, Mapping) else s for p, s in optimizer.state.items()}
        state = (t for s in self.entries.values() if isinstance(s, dict) for t in s.values() if isinstance(t, Tensor))
        self.held, self.count = [*moved, *state], len(moved)
        self.copies = [t.clone() for t in self.held]

    @property
    def theta(self) -> list[Tensor]:
        """Copies of the parameters as they were."""
        return self.copies[: self.count]

    def undo(self, error: BaseException) -> None:
        """Restore them after an error, and raise one that says so where it is the step's own arithmetic that failed.

        Raises:
            NonFiniteError: numbers of the step's own overflow.
        """
        self.restore()
        if isinstance(error, RuntimeError) and "overflow" in str(error):
            raise NonFiniteError(
                f"the optimizer's step at the learning rate {float(self.optimizer.param_groups[0]['lr']):g} is more "
                "than its numbers hold, and was not made; use a smaller learning rate"
            ) from error

    @torch.no_grad()
    def restore(self) -> None:
        """Restore them; anything else that the step put into the state is dropped."""
        for t, copy in zip(self.held, self.copies):
            t.copy_(copy)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.entries)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest |entry| of all; NaN where one is. Unlike a norm it does not overflow by itself.

    Of tensors that are shared out, the mean over the processes of the largest that each has: finite where all are.
    """
    foreach = False if torch.compiler.is_compiling() else None
    parts = [part for part in map(processes.own, tensors) if part.numel()]
    norm = torch.nn.utils.get_total_norm(parts, math.inf, foreach=foreach)
    norm = norm.to(at_least_single(norm.dtype))
    return processes.mean(norm) if any(map(processes.is_part, tensors)) else norm


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of Γ, which all processes have, or share out between them."""
    if not any(map(processes.is_part, gradients)):
        return torch.nn.utils.get_total_norm(gradients)
    parts, wholes = ([processes.own(g) for g in gradients if processes.is_part(g) is part] for part in (True, False))
    squares = processes.total(torch.nn.utils.get_total_norm([g for g in parts if g.numel()]).square())
    return (squares + torch.nn.utils.get_total_norm(wholes).square()).sqrt()


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's `state_dict`, of all of the tensors that are shared out."""
    state = optimizer.state_dict()

    def whole(value: Any) -> Any:
        return processes.whole(value) if isinstance(value, Tensor) else value

    held = {i: {key: whole(v) for key, v in each.items()} for i, each in state["state"].items()}
    return state | {"state": held}


def load_whole_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `whole_state` returned; what belongs to a parameter that is shared out is shared out like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(value: Any, p: Tensor) -> Any:
        return processes.part_of(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    held = {i: {key: part(v, parameters[int(i)]) for key, v in each.items()} for i, each in state["state"].items()}
    optimizer.load_state_dict({**state, "state": held})


def parts_of_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that all processes have, along a first dimension."""
    return [None if p.grad is None else _parts(p.grad) for p in parameters]


def _parts(gradient: Tensor) -> Tensor:
    """All parts of a sum; that of a parameter which is shared out has been added up already."""
    whole = processes.whole(gradient)[None]
    return whole if processes.is_part(gradient) else processes.gathered(whole)


def load_gradients(parameters: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    """Take what `parts_of_gradients` returned: the own part, or all in the first of more or fewer processes."""

    def own(part: Tensor) -> Tensor:
        if len(part) == processes.count():
            return processes.share(part)[0]
        return part.sum(0) * (processes.count() == 1 or processes.rank() == 0)

    for p, part in zip(parameters, parts, strict=True):
        if part is not None and processes.is_part(p):
            p.grad = processes.part_of(part.sum(0).to(p.dtype), p)
        else:
            p.grad = None if part is None else torch.empty_like(p).copy_(own(part))  # in its layout: norms round alike


def unsound_gradients(parameters: Sequence[Tensor]) -> str | None:
    """Which gradients hold NaN or infinity, in words; None where none do."""
    bad = sum(p.grad is not None and not processes.own(p.grad).isfinite().all() for p in parameters)
    return f"the gradient of {bad} of {len(parameters)} parameter tensors holds NaN or infinity" if bad else None
