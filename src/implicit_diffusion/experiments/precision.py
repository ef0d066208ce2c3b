"""What the device can compute in, and whether the network could be compiled: found out before any long work."""

from __future__ import annotations

import torch
from torch import nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser, inner
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops.compiled import Compiled
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain


def check_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype that the network's layers compute in; None for that of its weights.

    Raises:
        InvalidInputError: float16, or a device without bfloat16.
    """
    if precision == "float32":
        return None
    if precision == "fp16":
        raise InvalidInputError(
            "--precision fp16: adjoints span more than float16 can hold, and Γ would lose its small entries; take bf16"
            ", which has float32's range, or float32"
        )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InvalidInputError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in bfloat16; take float32, with "
            "--gradient-checkpointing where memory is short"
        )
    try:
        x = torch.ones(8, 8, device=device, dtype=torch.bfloat16)
        torch.nn.functional.conv2d((x @ x)[None, None], x[None, None])
    except RuntimeError as error:
        raise InvalidInputError(f"--precision bf16: {device} does not compute in it ({error}); take float32") from error
    return torch.bfloat16


def compiled(chain: Chain, wanted: bool) -> str | None:
    """Compile u_θ and u_0, and try both; returns what became of it, None where nobody asked.

    Weight averages, which are sampled from only at the end, are compiled when they are first called.
    """
    if not wanted:
        return None
    parts = [inner(part) for part in (chain.denoiser, chain.reference) if isinstance(part, nn.Module)]
    networks = [part for part in parts if isinstance(part, DiffusersDenoiser)]
    for network in networks:
        network.compiled = network.compiled or Compiled(network.model, differentiates=False, dynamic=None)
    noise, made = Noise(0), [network.compiled for network in networks if isinstance(network.compiled, Compiled)]
    x = chain.initial(noise, 2)[None].requires_grad_()
    with chain.evaluating(), torch.enable_grad():
        here = chain.transition(x, [0], reference=True, condition=chain.conditions(noise, 2, [0]))
        assert here.u0 is not None
        torch.autograd.grad((here.u + here.u0).sum(), x)
    chain.evaluations = 0
    reasons = [c.reason for c in made if c.reason]
    return f"not compiled: {reasons[0]}" if reasons else "compiled"
