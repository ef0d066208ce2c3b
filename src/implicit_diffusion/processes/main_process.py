"""What one process does for all of them, and what each tells the others: small objects, not samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from implicit_diffusion.errors import ProcessError
from implicit_diffusion.processes.group import control, for_all, is_main, noticing_the_lost, state, traffic, world_size

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def any_of(flag: bool) -> bool:
    """Whether the flag is set in one of all W processes; a call that waits for all of them."""
    return flag if world_size() == 1 or state.lost else any(collected(flag))


def collected(value: Result) -> list[Result]:
    """The value that each of the W processes has, in their order."""
    if world_size() == 1 or state.lost:
        return [value]
    values: list[Any] = [None] * world_size()
    with noticing_the_lost():
        traffic.calls += 1
        dist.all_gather_object(values, value, group=control())
    return values


def from_main(function: Callable[[], Result]) -> Result:
    """What the function returns, or raises, in the main process, where alone it is called; the others wait for it.

    Where another process has ended, the main process calls it by itself, and nothing is called elsewhere.
    """
    if world_size() == 1 or state.for_all:
        return function()
    if state.lost and not is_main():
        raise ProcessError("the main process cannot be reached any more")
    made: list[Any] = [None, None]
    raised: BaseException | None = None
    if is_main():
        try:
            with for_all():
                made[0] = function()
        except BaseException as error:  # an interrupt as well: the others are not left waiting
            raised, made[1] = error, error
    if not state.lost:
        with noticing_the_lost():
            traffic.calls += 1
            dist.broadcast_object_list(made, src=0, group=control())
    if raised is not None:
        raise raised
    if made[1] is not None:
        raise made[1]
    returned: Result = made[0]
    return returned


def main_only(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function as one that is called in the main process alone, by `from_main`."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return from_main(lambda: function(*args, **kwargs))

    return called
