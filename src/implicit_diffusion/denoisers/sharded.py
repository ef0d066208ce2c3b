"""Networks that do not fit one device: each of W processes keeps 1/W of every weight (FSDP2).

A block's weights are gathered when the block is called, and dropped after it. So all processes must call a network
equally often; loops and evaluations do. Weights, gradients and the optimizer's moments are of the class `DTensor`: each
process holds its part, and the gradient is summed over the processes once per update, by the last of its calls.

(PyTorch's `fully_shard`; Zhao et al., *PyTorch FSDP*, arXiv 2304.11277; Rajbhandari et al., *ZeRO*, arXiv 1910.02054.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from implicit_diffusion import processes
from implicit_diffusion.denoisers.adapter import unwrapped
from implicit_diffusion.errors import InvalidInputError, check_type

BLOCKS = (nn.ModuleList, nn.Sequential)


def shard(denoiser: nn.Module, device: torch.device | str = "cpu") -> None:
    """Share out the weights of a denoiser's network over all processes, in place, block by block.

    It comes before the optimizer is built, and after a frozen copy has been made, which is shared out as well. The
    weights may be on the CPU: each block is moved to the device by itself.

    Args:
        denoiser: a `DiffusersDenoiser`, guidance and embeddings around one, or any module.
        device: where the network computes.

    Raises:
        InvalidInputError: there is a single process; a network that is shared out already; torch before 2.8.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    check_type("denoiser", denoiser, nn.Module, "its network is a module")
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise InvalidInputError(
            f"weights are shared out by torch 2.8 or newer, and this is torch {torch.__version__}, which divides the "
            "gradients that it sums; install a newer one"
        )
    network = network_of(denoiser)
    if processes.world_size() == 1:
        raise InvalidInputError(
            "a network is shared out over several processes, and this is the only one; start them by torchrun"
        )
    if isinstance(network, FSDPModule):
        raise InvalidInputError(f"the network {type(network).__name__} is shared out already")
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # no other memory format can be cut
    network.__dict__[ORIGINAL] = _without_memory(network)
    mesh = init_device_mesh(torch.device(device).type, (processes.world_size(),))
    for block in [*_blocks(network), network]:
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)  # so that `parameters()` are parts at any time
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # Γ is a sum,
            part.set_force_sum_reduction_for_comms(True)  # which gloo has, unlike the scaled one


ORIGINAL = "_network_without_memory"


def network_of(denoiser: Any) -> nn.Module:
    """The network inside of a denoiser, which is shared out; the denoiser itself where it is none of diffusers."""
    inner = unwrapped(denoiser)
    network = getattr(inner, "model", inner)
    return network if isinstance(network, nn.Module) else inner


def is_sharded(denoiser: object) -> bool:
    """Whether the weights of a denoiser are shared out over processes."""
    return isinstance(denoiser, nn.Module) and ORIGINAL in network_of(denoiser).__dict__


@contextmanager
def gradient_sync(denoiser: object, on: bool) -> Iterator[None]:
    """Context in which a backward pass sums the gradient over the processes, with all that earlier ones have left, or
    leaves it to a later one. Without weights that are shared out it does nothing.
    """
    if not is_sharded(denoiser):
        yield
        return
    network: Any = network_of(denoiser)
    network.set_requires_gradient_sync(on)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def whole_copy(denoiser: nn.Module) -> nn.Module:
    """A denoiser like this one, on the CPU and with all of its weights in the main process; a call for all processes.

    In the other processes its weights are on the meta device. A denoiser that is not shared out is returned as it is.
    """
    check_type("denoiser", denoiser, nn.Module, "its network is a module")
    if not is_sharded(denoiser):
        return denoiser
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    network, inner = network_of(denoiser), unwrapped(denoiser)
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = copy.deepcopy(network.__dict__[ORIGINAL])
    if processes.is_main():
        whole.to_empty(device="cpu")
        whole.load_state_dict(state, strict=False)
    if inner is network:
        return whole
    result = copy.copy(inner)
    result._modules = inner._modules | {"model": whole}
    return result


def _without_memory(network: nn.Module) -> nn.Module:
    """A copy of the network's structure, whose parameters and buffers are on the meta device."""
    tensors = [*network.parameters(), *network.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(network, memo)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered together: the elements of the network's lists of blocks, and its other large parts."""
    for part in network.children():
        if isinstance(part, BLOCKS):
            yield from part
        elif any(isinstance(inner, BLOCKS) for inner in part.modules()):
            yield part
