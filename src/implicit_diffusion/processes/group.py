"""The processes that `torch.distributed` has connected, and whether samples are shared out over them at present."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from implicit_diffusion.errors import ProcessError

PATIENCE = timedelta(days=7)  # for the main process, which may draw or save for long; one that ends is noticed at once


@dataclass
class Traffic:
    """What this process has handed to `torch.distributed`.

    Args:
        calls: collective calls.
        bytes: of the tensors that it contributed to them; objects that `from_main` hands over count as calls alone.
    """

    calls: int = 0
    bytes: int = 0


@dataclass
class State:
    """What this process knows of its group."""

    sharing: bool = False
    for_all: int = 0  # depth of calls that the main process makes on behalf of all: nobody else takes part in them
    lost: bool = False  # another process has ended: from here on, nobody can be asked
    control: Any = None  # a gloo group beside the one of the tensors, which waits for the main process
    world: Any = None  # the process group that `control` belongs to


state = State()
traffic = Traffic()


def world_size() -> int:
    """W, whether or not samples are being shared out: 1 where `torch.distributed` was not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among W, whether or not samples are being shared out."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and prints, number 0."""
    return rank() == 0


def count() -> int:
    """The number of processes that the samples are shared out over at present."""
    return world_size() if state.sharing else 1


@contextmanager
def sharing() -> Iterator[None]:
    """Context, or decorator, in which samples are shared out over all processes; they must enter it alike.

    In what the main process does on behalf of all, it stays alone.
    """
    if world_size() > 1:
        control()  # before anybody can be lost
    with _set(not state.for_all):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Context in which this process computes by itself: on samples of its own, or on all of them as the others do."""
    with _set(False):
        yield


@contextmanager
def for_all() -> Iterator[None]:
    """Context of what this process does on behalf of all."""
    state.for_all += 1
    try:
        with _set(False):
            yield
    finally:
        state.for_all -= 1


@contextmanager
def _set(value: bool) -> Iterator[None]:
    before, state.sharing = state.sharing, value
    try:
        yield
    finally:
        state.sharing = before


def counted(x: Tensor) -> None:
    """Count a collective call to which this process contributes x."""
    traffic.calls += 1
    traffic.bytes += x.nbytes


def control() -> Any:
    """The group of gloo over which processes wait for the main one; made at its first use, by all of them."""
    if state.world is not dist.group.WORLD:
        group = dist.new_group(timeout=PATIENCE, backend="gloo")
        state.world, state.control, state.lost = dist.group.WORLD, group, False
    return state.control


@contextmanager
def noticing_the_lost() -> Iterator[None]:
    """Turn the errors of a connection that broke, or of one that timed out, into one of ours.

    Raises:
        ProcessError: in place of those.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are among them
        state.lost = True
        raise ProcessError(
            f"another process of this run has ended, or does not answer ({str(error).splitlines()[0]})"
        ) from error
