"""Whether the particles' dtype resolves the steps that a kernel makes."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.samplers.kernel import Kernel

CHECKED = 1024  # iterations from one check of the spacing of numbers to the next: a check waits for the device


def check_resolved(kernel: Kernel, x: Float[Tensor, "n *event"], k: int, scale: float = 1.0) -> None:
    """Check, in one of every `CHECKED` iterations, that the particles' dtype does not round steps away.

    Sums of a particle and its step are rounded by up to half a spacing u of the numbers there, which adds a variance of
    u²/12 to that of the step. It may be one per cent of that at most, for coordinates as large as they are on average.

    Args:
        kernel: the sampler's step.
        x: the particles.
        k: the iteration.
        scale: of the kernel's step sizes.

    Raises:
        InvalidInputError: at the first iteration, k = 0; later it warns.
    """
    if k % CHECKED:
        return
    size = float(processes.mean(x.detach().abs().mean(0)).amax())
    reach = kernel.reach(scale * kernel.step_size_at(k))
    spacing = torch.finfo(x.dtype).eps * 2.0 ** (math.frexp(size)[1] - 1) if math.isfinite(size) else 0.0
    if spacing**2 / 12 <= 0.01 * reach * reach:
        return
    message = (
        f"steps of {type(kernel).__name__} move particles by about {reach:.1g}, but {x.dtype} numbers as large as "
        f"{size:.2g} are {spacing:.1g} apart, so that steps are rounded away; shift the data towards zero (subtract "
        "their mean), use a larger step size, or particles and potential in a wider dtype"
    )
    if k == 0:
        raise InvalidInputError(message)
    warnings.warn(message, stacklevel=3)
