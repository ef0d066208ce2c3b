"""The device that a run computes on, and what to say when its memory is used up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError, MemoryLimitError
from implicit_diffusion.processes import world_size

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is an accelerator if there is one, else the CPU.

    Of several processes, each has a GPU of its own, whichever is named: the one with its number on its machine,
    LOCAL_RANK, as launchers set it.

    Raises:
        InvalidInputError: there is no such device, or none for each process.
    """
    if world_size() > 1 and torch.cuda.is_available() and name.partition(":")[0] in ("auto", "cuda"):
        return _own_gpu()
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
            reason = str(error).splitlines()[0]
            raise InvalidInputError(f"`device` {name}: {reason}; use auto, cpu, or one that is here") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _own_gpu() -> torch.device:
    number, count = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())), torch.cuda.device_count()
    if number >= count:
        raise InvalidInputError(
            f"`device`: process {number} of this machine has no GPU of its own, there are {count}; start as many "
            "processes as there are GPUs, or use cpu"
        )
    return torch.device("cuda", number)


@contextmanager
def naming_memory() -> Iterator[None]:
    """Turn the errors of Python, NumPy and torch when memory is used up into one error of ours.

    Raises:
        MemoryLimitError: in place of those.
    """
    try:
        yield
    except ImplicitDiffusionError:
        raise
    except (MemoryError, RuntimeError) as error:  # torch's allocator of the CPU raises a bare RuntimeError
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(m in text for m in OUT_OF_MEMORY):
            raise
        reason = text.splitlines()[0] if text else "nothing is left"
        raise MemoryLimitError(
            f"memory is used up ({reason}); use less at a time, such as a smaller `batch` or fewer `particles`, or "
            "free some"
        ) from error
