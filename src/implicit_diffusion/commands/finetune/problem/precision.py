"""Whether a device computes in a precision, and how fast: tried before any long work."""

from __future__ import annotations

import time
import warnings

import torch
from torch import nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser, unwrapped
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype that the network's layers compute in; None for that of its weights.

    Raises:
        InvalidInputError: the device does not compute in it, forward or backward.
    """
    if precision == "float32":
        return None
    dtype, other = NAMES[precision], "fp16" if precision == "bf16" else "bf16"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InvalidInputError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in bfloat16; use fp16, or "
            "float32, with --gradient-checkpointing where memory is short"
        )
    x = torch.ones(1, 1, 8, 8, device=device, requires_grad=True)
    try:
        with warnings.catch_warnings(), torch.autocast(device.type, dtype=dtype):
            warnings.simplefilter("ignore")  # autocast would warn, and compute in float32
            y = torch.nn.functional.conv2d(x @ x, x)
        y.float().sum().backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    else:
        if y.dtype is dtype:
            return dtype
        reason = f"its layers return {y.dtype}"
    raise InvalidInputError(
        f"--precision {precision}: {device} does not compute in it ({reason}); use float32 or {other}"
    )


def slower_than_float32(chain: Chain) -> str | None:
    """What to know of a lower precision on a CPU, whose instructions may lack it; None where it is the faster one.

    u_θ and u_0 are called in either precision, for two samples and with the gradient in x, the better time of two.
    """
    networks = [each for each in networks_of(chain) if each.precision is not None]
    weights = [p for each in networks for p in each.parameters()]
    if chain.device.type != "cpu" or not networks or any(p.dtype.itemsize < 4 for p in weights):
        return None
    lower = networks[0].precision
    seconds = min(_seconds(chain) for _ in range(2))
    try:
        for each in networks:
            each.precision = None
        other = min(_seconds(chain) for _ in range(2))
    finally:
        for each in networks:
            each.precision = lower
    if seconds <= other:
        return None
    ratio = f"{seconds / other:.1f} times slower than float32 ({seconds:.2g} s against {other:.2g} s a call)"
    return f"{str(lower).removeprefix('torch.')} is {ratio} on this processor; leave --precision out"


def _seconds(chain: Chain) -> float:
    began = time.perf_counter()
    _call(chain)
    return time.perf_counter() - began


def networks_of(chain: Chain) -> list[DiffusersDenoiser]:
    """The networks of u_θ and u_0, which are one under adapters."""
    parts = [unwrapped(part) for part in (chain.denoiser, chain.reference) if isinstance(part, nn.Module)]
    return [part for part in dict.fromkeys(parts) if isinstance(part, DiffusersDenoiser)]


def _call(chain: Chain) -> None:
    """Call u_θ and u_0 for two samples, and differentiate both."""
    noise = Noise(0)
    x = chain.initial(noise, 2)[None].requires_grad_()
    with chain.evaluating(), torch.enable_grad():
        here = chain.transition(x, [0], reference=True, condition=chain.conditions(noise, 2, [0]))
        assert here.u0 is not None
        torch.autograd.grad((here.u + here.u0).sum(), x)
