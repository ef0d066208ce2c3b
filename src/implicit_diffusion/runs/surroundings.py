"""What a run computes with: versions, device and number of threads, which decide how sums are rounded."""

from __future__ import annotations

import importlib.metadata
import platform
from contextlib import suppress

import torch

from implicit_diffusion import __version__

OURS = "implicit-diffusion"
PACKAGES = ("diffusers", "numpy", "safetensors")


def describe(device: torch.device) -> dict[str, str]:
    """Device, threads and versions, each in words."""
    return {"device": f"{device.type}, {kind(device)}", "threads": str(torch.get_num_threads()), **versions()}


def versions() -> dict[str, str]:
    """Versions by package, of this library and of Python too."""
    installed = {OURS: __version__, "torch": str(torch.__version__)}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # sources that are on the path, but not installed
            installed[name] = importlib.metadata.version(name)
    python = ".".join(platform.python_version_tuple()[:2])  # a patch release of Python changes no number
    return installed | {"python": python}


def kind(device: torch.device) -> str:
    """What computes there: the instruction set of the CPU, or the name of the accelerator."""
    if device.type == "cpu":
        return f"cpu with {torch.backends.cpu.get_cpu_capability()}"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def kind_of(name: str) -> str | None:
    """The same for a device by its name; None where there is no such device here."""
    try:
        return kind(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError, TypeError):
        return None


def usual_device() -> str:
    """The accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(accelerator or "cpu")
