"""The processes that torchrun, accelerate or Slurm has started, as one run: they meet, one speaks, they end together.

A process that ends leaves word in the store of the group. An error is printed once: by the main process, or by the
first that is left. Where a process met the loss of another, it adds the word of that one, or that there is none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.processes import is_main, rank, world_size
from implicit_diffusion.processes.group import PATIENCE, control
from implicit_diffusion.runs.signals import deaf

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # in the environment, by every launcher
FAREWELL = 5.0  # seconds that a process which fails waits for the others to say how they ended
POLL = 0.02  # seconds
INTERRUPTED = 130  # exit status of a process that was told of an interrupt, as of one that Ctrl-C has ended


@dataclass(frozen=True)
class End:
    """How a process ended.

    Args:
        status: its exit status, 0 if all went well.
        message: one line; empty where there is nothing to say.
        lost: whether it ended since another one had ended.
    """

    status: int = 0
    message: str = ""
    lost: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it."""
        return self.status > 128

    @property
    def by_itself(self) -> bool:
        """Whether it ended for a reason of its own."""
        return self.status != 0 and not self.lost


class Group:
    """The processes of one program; a single one where no launcher has started several.

    Args:
        store: of the group that was made here; None where there is none.
        stderr: what is printed to at the end.
    """

    def __init__(self, store: Any, stderr: Any) -> None:
        self._store, self._stderr = store, stderr

    def leave(self, end: End) -> int:
        """Say how this process ends; prints it once for all of them, and returns the exit status."""
        ends = {rank(): end} if self._store is None else self._ends(end)
        status, text = concluded(rank(), world_size(), ends)
        if text and (is_main() if self._store is None else speaks(rank(), ends)):
            print(text, file=self._stderr, flush=True)
        if status == 0 and self._store is not None:  # after a loss, that might wait for ever
            dist.destroy_process_group()
        return status

    def _ends(self, end: End) -> dict[int, End]:
        """How this process and others have ended, by their numbers; where it failed, it waits for them for a while."""
        ends = {rank(): end}
        deaf(for_good=True)
        with suppress(RuntimeError):  # the process with the store has ended
            self._store.set(_key(rank()), json.dumps(asdict(end)))
            due = time.monotonic() + (FAREWELL if end.status else 0.0)
            while True:
                for other in set(range(world_size())) - ends.keys():
                    if self._store.check([_key(other)]):
                        ends[other] = End(**json.loads(self._store.get(_key(other))))
                if len(ends) == world_size() or time.monotonic() > due:
                    break
                time.sleep(POLL)
        return ends


def speaks(own: int, ends: dict[int, End]) -> bool:
    """Whether process `own` prints the error: the first of those that failed.

    Where no word has come from the main process, it may be waiting for this one, and learns of its end later. Only who
    met a loss knows better.
    """
    failed = [number for number in sorted(ends) if ends[number].status]
    return failed[:1] == [own] and (0 in ends or ends[own].lost)


def concluded(own: int, count: int, ends: dict[int, End]) -> tuple[int, str]:
    """The exit status of process `own` of `count`, and what there is to say, from how these have ended.

    Where a signal to one of them has ended all, the status is that of this signal.
    """
    end = ends[own]
    if end.interrupted:
        heard = [other.status for other in ends.values() if other.interrupted and other.status != INTERRUPTED]
        end = replace(end, status=(heard or [INTERRUPTED])[0])
    if count == 1 or not (end.lost or end.interrupted):
        return end.status, end.message
    others = [(number, ends[number]) for number in sorted(ends) if number != own and ends[number].by_itself]
    for number, other in others:
        if not other.interrupted:
            said = other.message.removeprefix("error: ")
            return other.status, f"{end.message}. Process {number} of {count} has ended with this: {said}"
    if end.lost and others:
        return others[0][1].status, others[0][1].message
    if missing := [str(number) for number in range(count) if number not in ends]:
        which = f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {count}"
        return end.status, f"{end.message}. No word came from {which}: it was killed, or does not answer"
    return end.status, end.message


@contextmanager
def joined() -> Iterator[Group]:
    """Connect the processes that a launcher has started, for the block; without a launcher, do nothing.

    Only the main process prints within it. Each computes on a GPU of its own where there are any.

    Raises:
        InvalidInputError: the launcher's variables cannot be used.
    """
    store = None if dist.is_initialized() or not _launched() else _join()
    streams = sys.stdout, sys.stderr
    group = Group(store, streams[1])
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        if not is_main():
            sys.stdout = sys.stderr = nowhere
        try:
            yield group
        except Exception as error:  # not one of ours: a traceback is all that there is to say
            group.leave(End(1, f"{type(error).__name__}: {error}"))
            raise
        finally:
            sys.stdout, sys.stderr = streams


def _launched() -> bool:
    count = os.environ.get("WORLD_SIZE", "1")
    return dist.is_available() and all(name in os.environ for name in LAUNCHED) and count.isdigit() and int(count) > 1


def _join() -> Any:
    """Make the group; returns its store."""
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
    try:
        store, number, count = next(rendezvous("env://"))
        dist.init_process_group(store=PrefixStore("run", store), rank=number, world_size=count, timeout=PATIENCE)
        dist.barrier(group=control())  # one that is refused ends at once, which breaks the connections of the others
    except (RuntimeError, ValueError) as error:
        raise InvalidInputError(
            f"the processes of the launcher cannot be connected: {str(error).splitlines()[0]}; start them again"
        ) from error
    deaf()  # between a command and its end: a launcher ends the others as soon as one has ended
    return PrefixStore("ends", store)


def _key(number: int) -> str:
    return f"process {number}"
