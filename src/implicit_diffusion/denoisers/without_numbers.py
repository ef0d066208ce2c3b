"""Networks on the meta device, whose tensors have shapes and no numbers: what they answer, and what autograd keeps.

A network without memory can be evaluated like any other, with three differences. An operation that reads a number, as
in `if mask.all()`, has none to read: it gets a one, which is "all" and "finite". Attention would fall back to the
formula that keeps its whole matrix, whereas CPUs and GPUs have fused kernels, which keep queries, keys, values, the
mask, the result and one number per query (Dao et al., *FlashAttention*, arXiv 2205.14135): so it does here. And tensors
of the host cannot be mixed with the network's: `hollow` moves them, and answers zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@contextmanager
def without_numbers() -> Iterator[None]:
    """Context in which networks on the meta device read ones, attend as by a fused kernel, and answer there."""
    _INSIDE.append(True)
    try:
        with _Ones(), _Fused():
            yield
    finally:
        _INSIDE.pop()


_INSIDE: list[bool] = []  # one entry for every such context


def hollow(network: nn.Module, device: torch.device | str = "cpu") -> None:
    """Let a network on the meta device, and each of its layers, be called from `device`, in place.

    It answers zeros there, in the shape and dtype of its answers. To diffusers it looks like a network whose weights
    are offloaded, which computes on `device`.
    """
    for layer in network.modules():
        layer.__dict__["forward"] = _entered(layer.forward, device)
    network.__dict__["_hf_hook"] = SimpleNamespace(execution_device=torch.device(device))


@contextmanager
def buffers_on_host(network: nn.Module) -> Iterator[None]:
    """Context in which the buffers of a network on the meta device are zeros on the host, where pipelines read them."""
    held = [(layer, name, buffer) for layer in network.modules() for name, buffer in layer._buffers.items()]
    for layer, name, buffer in held:
        if buffer is not None and buffer.is_meta:
            layer._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    try:
        yield
    finally:
        for layer, name, buffer in held:
            layer._buffers[name] = buffer


def _entered(forward: Any, device: torch.device | str) -> Any:
    @functools.wraps(forward)
    def enter(*arguments: Any, **options: Any) -> Any:
        if _INSIDE:
            return forward(*arguments, **options)
        arguments, options = tree_map_only(Tensor, lambda x: x.to("meta"), (arguments, options))
        with without_numbers():
            answer = forward(*arguments, **options)
        return tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device), answer)

    return enter


class _Ones(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


class _Fused(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("query", "key", "value", "attn_mask"), args)) | (kwargs or {})
        if func is nn.functional.scaled_dot_product_attention and given["query"].is_meta:
            return _Attention.apply(given["query"], given["key"], given["value"], given.get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Attention of which only shapes are known, and what a fused kernel keeps of it for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        *batch, heads, length, _ = query.shape
        result = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-2, -3)  # as the kernels lay it out
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, normaliser)
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return (*(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None)
