"""The device that a run computes on, and what to say when its memory is used up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError, MemoryLimitError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is an accelerator if there is one, else the CPU.

    Raises:
        InvalidInputError: there is no such device.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
            reason = str(error).splitlines()[0]
            raise InvalidInputError(f"`device` {name}: {reason}; use auto, cpu, or one that is here") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


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
