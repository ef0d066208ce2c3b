"""Frozen weights that are kept in half precision and read in single precision.

A checkpoint in bfloat16 has the same numbers in float32, at twice the bytes. Under low-rank adapters its weights are
constant, so they stay as they were saved, and every layer reads its own in float32 when it is called:

    y = W x + b with float32(W),        backward: x̄ = Wᵀ ȳ with float32(W) again,  W̄ not needed

So u is, to the last bit, that of the network in float32, whatever precision it is computed in: autocast rounds a weight
to the dtype that the layer computes in, which leaves one alone that has this dtype already. Linear layers and
convolutions, which hold nearly all weights, keep W for the backward pass and no copy of it in float32.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input
from torch.utils._pytree import tree_map

from implicit_diffusion.denoisers.sharded import network_of
from implicit_diffusion.errors import check_type
from implicit_diffusion.rounding import at_least_single

Module = TypeVar("Module", bound=nn.Module)
HALF = (torch.float16, torch.bfloat16)
MARK = "_reads_in_single"


def read_in_single(network: nn.Module) -> None:
    """Freeze a network and let its layers read weights of half precision in float32, in place.

    Names of weights, and what `isinstance` says of layers, stay as they were. Buffers become float32.

    Args:
        network: whose weights are on any device.
    """
    check_type("network", network, nn.Module, "use the model of a denoiser")
    network.requires_grad_(False)
    for layer in network.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            if buffer.dtype in HALF:
                layer._buffers[name] = buffer.float()
        if any(p.dtype in HALF for p in layer.parameters(recurse=False)):
            layer.__class__ = _reading(type(layer))
            network.__dict__[MARK] = True


def reads_in_single(denoiser: object) -> bool:
    """Whether layers of the network inside a denoiser read weights of half precision in float32."""
    return isinstance(denoiser, nn.Module) and MARK in network_of(denoiser).__dict__


def single_copy(denoiser: Module) -> Module:
    """A copy of a denoiser whose network has half weights: on the CPU, with plain layers in float32."""
    memo: dict[int, Any] = {}
    for p in denoiser.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("cpu", at_least_single(p.dtype), copy=True), p.requires_grad)
    result = copy.deepcopy(denoiser, memo).cpu()
    for layer in result.modules():
        if isinstance(layer, _Reading):
            layer.__class__ = type(layer).__mro__[2]  # the class that it had
    network_of(result).__dict__.pop(MARK, None)
    return result


class _Reading:
    """The mark of layers that read their weights in float32."""


_CLASSES: dict[type, type] = {}


def _reading(layer_class: type) -> type:
    """The class of such layers, one for each class of layers; its base classes are the mark and that class."""
    if layer_class not in _CLASSES:
        forward = {nn.Linear: _linear, nn.Conv2d: _convolution}.get(layer_class, _other(layer_class))
        _CLASSES[layer_class] = type(layer_class.__name__, (_Reading, layer_class), {"forward": forward})
    return _CLASSES[layer_class]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, layer.weight, layer.bias)
    y: Tensor = _Linear.apply(_float(x), layer.weight, layer.bias)
    return y


def _convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return layer._conv_forward(x, layer.weight, layer.bias)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return layer._conv_forward(_float(x), layer.weight.float(), _float(layer.bias))
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    y: Tensor = _Convolution.apply(_float(x), layer.weight, layer.bias, geometry)
    return y


def _other(layer_class: Any) -> Callable[..., Any]:
    """The forward of any other layer, during which its own weights are in float32. So is what it is given, which a
    pipeline may have converted to the dtype of the weights; under autocast, other layers have rounded it.
    """

    @functools.wraps(layer_class.forward)  # pipelines and `read_pipeline` look at the names of its arguments
    def forward(layer: nn.Module, *arguments: Any, **options: Any) -> Any:
        with _single(layer) as weights:
            if not torch.is_autocast_enabled(weights[0].device.type):
                arguments, options = tree_map(_float, (arguments, options))
            return layer_class.forward(layer, *arguments, **options)

    return forward


@contextmanager
def _single(layer: nn.Module) -> Iterator[list[Tensor]]:
    kept = dict(layer._parameters)
    try:
        for name, p in kept.items():
            layer._parameters[name] = _float(p)
        yield [p for p in kept.values() if p is not None]
    finally:
        layer._parameters.update(kept)


def _float(p: Any) -> Any:
    return p.float() if isinstance(p, Tensor) and p.dtype in HALF else p


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.float(), _float(bias))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return slopes[0] @ weight.float(), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return functional.conv2d(x, weight.float(), _float(bias), *geometry)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight.float(), slopes[0], *ctx.geometry), None, None, None
