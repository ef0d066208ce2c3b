"""Where a run computes."""

from __future__ import annotations

import torch


def find_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is an accelerator where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
