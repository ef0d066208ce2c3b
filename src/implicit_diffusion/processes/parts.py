"""Tensors of which each process keeps a part: those (`DTensor`) of networks whose weights are shared out (FSDP2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is shared out, in every process; others as they are. A call for all processes.

    It is on the CPU: of a network that does not fit one device, the device holds one tensor at a time.
    """
    return tensor.full_tensor().cpu() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have, shared out as `like` is; where that is whole, the tensor as it is."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(tensor.to(like.device), placed.device_mesh, placed.placements, src_data_rank=None)


def own(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor that is shared out, in the same memory; others as they are."""
    return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def is_part(tensor: Tensor) -> bool:
    """Whether this process keeps a part of the tensor only."""
    return hasattr(tensor, "to_local")  # without an import of torch.distributed.tensor
