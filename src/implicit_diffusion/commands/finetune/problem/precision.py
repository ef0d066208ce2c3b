"""Whether the device computes in a precision, and whether the network compiles: tried before any long work."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from implicit_diffusion.compiled import Compiled
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


def compiled(chain: Chain) -> str:
    """Compile u_θ and u_0, and try both; returns in words whether that worked.

    Weight averages, which sample only at the end, are compiled when they are first called.
    """
    parts = [unwrapped(part) for part in (chain.denoiser, chain.reference) if isinstance(part, nn.Module)]
    networks = [part for part in parts if isinstance(part, DiffusersDenoiser)]
    for network in networks:
        network.compiled = network.compiled or Compiled(network.model, differentiates=False, dynamic=None)
    noise, made = Noise(0), [network.compiled for network in networks if isinstance(network.compiled, Compiled)]
    x = chain.initial(noise, 2)[None].requires_grad_()
    with chain.evaluating(), torch.enable_grad():
        here = chain.transition(x, [0], reference=True, condition=chain.conditions(noise, 2, [0]))
        assert here.u0 is not None
        torch.autograd.grad((here.u + here.u0).sum(), x)
    reasons = [c.reason for c in made if c.reason]
    return f"not compiled: {reasons[0]}" if reasons else "compiled"
