"""Frozen copies of networks, and evaluation mode for as long as a network must be a function.

Dropout makes u a random function, and BatchNorm's running statistics make it depend on earlier calls. Samplers and
gradients need one function of (x, t; θ), so networks run in evaluation mode there. Autocast caches its casts of the
weights until its outermost context ends, and a loop inside it would not see its own updates.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from implicit_diffusion.errors import InvalidInputError

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """A deep copy of `module` in evaluation mode whose parameters need no gradient.

    Raises:
        InvalidInputError: `module` is not a `torch.nn.Module` (a copy of a function shares the parameters that it
            closes over, and would be trained along with the original), or `copied` refuses it.
    """
    if not isinstance(module, nn.Module):
        raise InvalidInputError(
            f"frozen_copy: module must be a torch.nn.Module, got {type(module).__name__}; wrap the function "
            "in a module that owns its parameters, or build the frozen copy yourself."
        )
    return copied(module).eval().requires_grad_(False)


def trained_state(model: nn.Module, like: nn.Module | None = None, prefix: str = "") -> dict[str, Tensor]:
    """The state of a model without its frozen parameters; those are the frozen ones of `like`, with a prefix."""
    frozen = {prefix + name for name, p in (like or model).named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `trained_state` returned; the frozen parameters, which it leaves out, stay as they are."""
    model.load_state_dict(state | {name: v for name, v in model.state_dict().items() if name not in state})


def copied(module: Module) -> Module:
    """A deep copy that shares nothing with the original.

    The hooks of `torch.nn.utils` (`weight_norm`, `spectral_norm`, `prune`) store the tensor that they computed last on
    their layer. It has a gradient history, which torch does not copy: the copy gets its numbers, and computes it anew
    at its next call.

    Raises:
        InvalidInputError: a lazy layer without weights; a hook or function of a layer that closes over layers of the
            original; a part that cannot be copied.
    """
    check_complete(module)
    own = {id(part) for part in (*module.modules(), *module.parameters(), *module.buffers())}
    memo: dict[int, Any] = {}
    for name, layer in module.named_modules():
        for value in _attributes(layer):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
            elif any(id(held) in own for held in _closed_over(value)):
                raise InvalidInputError(
                    f"cannot copy {_called(name, layer)}: it holds the function "
                    f"{getattr(value, '__qualname__', value)}, which closes over the original and would keep its "
                    "weights; make it a method, or pass the copy yourself, reference=... of a Chain"
                )
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(module, memo)
    except Exception as error:  # parts raise any error
        raise InvalidInputError(
            f"cannot copy {_called(*_broken(module))}: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}; pass the copy yourself, reference=... of a Chain"
        ) from error


def check_complete(module: nn.Module) -> None:
    """Raise `InvalidInputError` where a lazy layer has no weights yet: a copy would draw others."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise InvalidInputError(
                f"{name} of {type(module).__name__} belongs to a lazy layer that has no weights yet; call the module "
                "once, before its optimizer is built"
            )


@contextmanager
def eval_mode(*modules: object) -> Iterator[None]:
    """Run `modules` as functions of their inputs and their current weights.

    They are in evaluation mode inside the block; afterwards every submodule has its previous mode. An autocast around
    the block casts the weights anew at every call.

    An argument may be anything that `modules_in` finds modules in; functions and None have no mode and are skipped.
    """
    owners = {id(owner): owner for module in modules if not isinstance(module, WITHOUT) for owner in modules_in(module)}
    training = [part for owner in owners.values() for part in owner.modules() if part.training]
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
        torch.set_autocast_cache_enabled(cached)


def modules_in(value: object) -> Iterator[nn.Module]:
    """The modules that a callable holds: itself, the owner of a bound method, arguments of a partial, attributes.

    Attributes of an instance are searched two levels deep, including lists, tuples and dicts of modules. Modules that a
    function closes over, or uses as globals, are not found.
    """
    return _modules_in(value, 2)


WITHOUT = (FunctionType, Tensor, float, int, str, NoneType, tuple, list, dict, type, ModuleType)  # skipped at once


def _modules_in(value: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, WITHOUT):
        return
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _modules_in(part, depth)
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__, depth)
    elif depth:
        for part in getattr(value, "__dict__", {}).values():
            inside = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
            yield from (m for m in inside if isinstance(m, nn.Module))
            if not isinstance(part, WITHOUT):
                yield from _modules_in(part, depth - 1)


def refuse_inference_mode() -> None:
    """Raise `InvalidInputError` inside `torch.inference_mode`, where nothing can be differentiated."""
    if torch.is_inference_mode_enabled():
        raise InvalidInputError(
            "gradients are needed here, and torch.inference_mode rules them out; leave it, or use torch.no_grad "
            "instead, which is harmless"
        )


Refreshed = tuple[nn.Module, str | SpectralNorm]


def parametrizations(module: nn.Module) -> list[Refreshed]:
    """Layers with a tensor that is computed from others, and what computes it.

    That is the tensor's name for `torch.nn.utils.parametrizations`, and the hook of `torch.nn.utils.spectral_norm`.
    """
    named = [
        (layer, name)
        for layer in module.modules()
        if parametrize.is_parametrized(layer)
        for name in layer.parametrizations  # type: ignore[union-attr]
    ]
    hooked = [
        (layer, hook)
        for layer in module.modules()
        for hook in getattr(layer, "_forward_pre_hooks", {}).values()  # layers of TorchScript have none
        if isinstance(hook, SpectralNorm)
    ]
    return [*named, *hooked]


@torch.no_grad()
def train_once(parametrized: Iterable[Refreshed]) -> None:
    """Evaluate parametrized tensors once in training mode.

    Spectral normalisation updates its estimate of the norm in training mode only; without this it would keep dividing
    by the norm of the first weights.
    """
    for layer, name in parametrized:
        if isinstance(name, SpectralNorm):
            device = getattr(layer, f"{name.name}_orig").device.type
            with torch.autocast(device, enabled=False):  # it writes into buffers
                name.compute_weight(layer, do_power_iteration=True)
            continue
        parts = list(layer.parametrizations[name])  # type: ignore[index]
        modes = [part.training for part in parts]
        for part in parts:
            part.train()
        getattr(layer, name)
        for part, mode in zip(parts, modes):
            part.train(mode)


def _attributes(layer: nn.Module) -> Iterator[Any]:
    """Attributes of a layer other than its parameters, buffers and parts, and the items of those that are containers.

    The result of `torch.compile` is left out: a copy is compiled again.
    """
    if hasattr(layer, "_orig_mod"):
        return
    for name, value in vars(layer).items():
        if name == "_compiled_call_impl":
            continue
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        yield from (value, *inside)


def _closed_over(value: Any) -> Iterator[Any]:
    """The objects that a function closes over."""
    while isinstance(value, functools.partial):  # its arguments are copied
        value = value.func
    for cell in getattr(value, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        yield content
        if isinstance(content, Callable) and not isinstance(content, nn.Module):  # type: ignore[arg-type]
            yield getattr(content, "__self__", None)


def _broken(module: nn.Module) -> tuple[str, nn.Module]:
    """The innermost part that cannot be copied."""
    for name, part in reversed(list(module.named_modules())):
        try:
            copy.deepcopy(part)
        except Exception:  # as in `copied`
            return name, part
    return "", module


def _called(name: str, layer: nn.Module) -> str:
    return f"layer {name} ({type(layer).__name__})" if name else f"the module ({type(layer).__name__})"
