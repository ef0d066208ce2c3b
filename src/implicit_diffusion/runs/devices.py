"""Where a run computes."""

from __future__ import annotations

import torch

from implicit_diffusion.errors import InvalidInputError


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is an accelerator where there is one, else the CPU.

    Raises:
        InvalidInputError: no such device here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
            reason = str(error).splitlines()[0]
            raise InvalidInputError(f"--device {name}: {reason}; take auto, cpu, or one that is here") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
