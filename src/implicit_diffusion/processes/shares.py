"""Who holds which samples, and the sums and means over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.processes.group import count, counted, noticing_the_lost, rank, world_size

GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
BUCKET = 2**26  # bytes of gradients that are summed in one call


def check_divides(name: str, number: int) -> int:
    """The share of each process in `number` samples.

    Raises:
        InvalidInputError: the processes cannot have equally many.
    """
    each, left = divmod(number, world_size())
    if left or not each:
        below = f"{number - left} or " if each else ""
        raise InvalidInputError(
            f"{name} must be a multiple of the number of processes, {world_size()}, got {number}; use "
            f"{below}{number - left + world_size()}"
        )
    return each


def share(x: Shaped[Tensor, "..."], dim: int = 0) -> Shaped[Tensor, "..."]:
    """This process's part of a whole, cut along `dim` into equal parts; a view."""
    if count() == 1:
        return x
    each = x.shape[dim] // count()
    return x.narrow(dim, rank() * each, each)


def total(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over all processes; differentiable in what this process adds to it."""
    added: Tensor = x if count() == 1 else _Total.apply(x)
    return added


def mean(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The mean over all processes, each of which holds equally many samples; differentiable in this process's part."""
    return x if count() == 1 else total(x) / count()


def gathered(x: Shaped[Tensor, "..."], dim: int = 0) -> Shaped[Tensor, "..."]:
    """The parts of all processes, in their order along `dim`; differentiable in this process's own."""
    whole: Tensor = x if count() == 1 else _Gathered.apply(x.movedim(dim, 0)).movedim(0, dim)
    return whole


def sum_gradients(tensors: Sequence[Tensor]) -> None:
    """Add the other processes' numbers to these, in place, in a few calls; in single precision at least."""
    if count() == 1:
        return
    for bucket in _buckets(tensors):
        kind = torch.promote_types(bucket[0].dtype, torch.float32)
        flat = _reduced(torch.cat([tensor.flatten().to(kind) for tensor in bucket]))
        for tensor, numbers in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(numbers.view_as(tensor))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduced(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        whole = x.new_empty((count() * len(x), *x.shape[1:]))
        ctx.own = slice(rank() * len(x), (rank() + 1) * len(x))
        with noticing_the_lost():
            counted(x)
            GATHER(whole, x)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[ctx.own]


def _reduced(x: Tensor) -> Tensor:
    """The sum over all processes, in place; equal to the bit in all of them."""
    x = x.contiguous()
    with noticing_the_lost():
        counted(x)
        dist.all_reduce(x)
    return x


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype and device, each of at most `BUCKET` bytes or of a single tensor."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = groups.setdefault((tensor.dtype, tensor.device), [])
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET:
            yield list(bucket)
            bucket.clear()
        bucket.append(tensor)
    yield from (bucket for bucket in groups.values() if bucket)
