"""What one process does for all of them, and what each tells the others: small objects, not samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from implicit_diffusion.errors import ImplicitDiffusionError, ProcessError
from implicit_diffusion.processes.group import (
    control,
    counted,
    for_all,
    is_main,
    noticing_the_lost,
    rank,
    state,
    traffic,
    world_size,
)

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def highest(*numbers: int) -> list[int]:
    """The largest of all W processes for each of these integers; one small call, which waits for all of them."""
    if world_size() == 1 or state.lost or state.for_all:
        return list(numbers)
    largest = torch.tensor(numbers)
    with noticing_the_lost():
        counted(largest)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=control())
    return list(map(int, largest.tolist()))


def collected(value: Result) -> list[Result]:
    """The value that each of the W processes has, in their order."""
    if world_size() == 1 or state.lost or state.for_all:
        return [value]
    values: list[Any] = [None] * world_size()
    with noticing_the_lost():
        traffic.calls += 1
        dist.all_gather_object(values, value, group=control())
    return values


def everywhere(function: Callable[[], Result]) -> Result:
    """What the function returns in this process; all call it, and an error of ours that one raises is raised in all.

    This is for what may be refused by one process alone, such as one whose device has too little memory left.
    """
    refused: ImplicitDiffusionError | None = None
    try:
        made = function()
    except ImplicitDiffusionError as error:
        refused = error
    of_others = next(filter(None, collected(refused)), None)
    if refused is not None or of_others is not None:
        raise refused or of_others  # type: ignore[misc]
    return made


def from_main(function: Callable[[], Result]) -> Result:
    """What the function returns, or raises, in the main process, where alone it is called; the others wait for it.

    An error of a class that is neither Python's nor ours reaches the others as one of the nearest class of Python.
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
            raised, made[1] = error, _for_others(error)
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


def _for_others(error: BaseException) -> BaseException:
    """The error as it can be handed over: a class from elsewhere may not be there, or not take its own words."""
    if isinstance(error, ImplicitDiffusionError) or type(error).__module__ == "builtins":
        return error
    nearest = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    try:
        return nearest(f"{type(error).__name__}: {error}")
    except TypeError:  # it takes more than words
        return ProcessError(f"process {rank()} raised {type(error).__name__}: {error}")


def main_only(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function as one that is called in the main process alone, by `from_main`."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return from_main(lambda: function(*args, **kwargs))

    return called


def main_alone(function: Callable[[], object]) -> None:
    """Call the function in the main process and nothing elsewhere. Nobody waits, and nobody learns of its error.

    This is for what has to be done when an error is on its way, which may be one of this process alone: nobody else
    would take part in `from_main` then.
    """
    if is_main():
        with for_all():
            function()


def in_turns(function: Callable[[int], Result], numbers: Sequence[int], *, in_step: bool = False) -> Iterator[Result]:
    """function(number) for all the numbers in their order, of which the processes compute W at a time, one each.

    Each of them computes by itself, what it would without the others, and all of them get all results. An error, or an
    interrupt, of one is raised in all.

    Args:
        function: of a number.
        numbers: that it is called with.
        in_step: whether all processes must call it equally often, because it gathers weights that are shared out; those
            that are left over in the last turn then repeat its last number. An error is raised where it occurs only:
            the others may be waiting for weights, and notice when this process ends.
    """
    if world_size() == 1 or state.lost or state.for_all:
        yield from map(function, numbers)
        return
    for first in range(0, len(numbers), world_size()):
        batch = numbers[first : first + world_size()]
        made, raised = None, None
        if in_step or rank() < len(batch):
            try:
                with for_all():
                    made = function(batch[min(rank(), len(batch) - 1)])
            except BaseException as error:
                if in_step:
                    raise
                raised = error
        ours = raised is None or isinstance(raised, (ImplicitDiffusionError, KeyboardInterrupt))
        shown = raised if ours else ProcessError(f"process {rank()} raised {type(raised).__name__}: {raised}")
        results = collected((made, shown))
        if raised is not None:
            raise raised
        for _, failure in results:
            if failure is not None:
                raise failure
        for result, _ in results[: len(batch)]:
            assert result is not None
            yield result
