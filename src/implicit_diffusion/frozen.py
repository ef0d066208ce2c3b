"""Modules that hold still: frozen copies to compare with, and evaluation mode while a network is a function.

Dropout and BatchNorm's running statistics make u a random function, or one with a memory. Inside samplers and
gradients it has to be one function of (x, t; θ), so networks run in evaluation mode there. Autocast has a memory too:
it keeps its casts of the weights until its outermost context ends, where a loop inside would never see its own updates.
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
    """A deep copy of `module` in evaluation mode whose parameters ask for no gradient.

    Raises:
        InvalidInputError: `module` is no `torch.nn.Module`. Copying a plain function would share the
            parameters that it closes over, and the "frozen" copy would be trained along with the original. Or else a
            module that `copied` refuses.
    """
    if not isinstance(module, nn.Module):
        raise InvalidInputError(
            f"frozen_copy: module must be a torch.nn.Module, got {type(module).__name__}; wrap the function "
            "in a module that owns its parameters, or build the frozen copy yourself."
        )
    return copied(module).eval().requires_grad_(False)


def copied(module: Module) -> Module:
    """A deep copy that shares nothing with the original.

    The hooks of `torch.nn.utils` (`weight_norm`, `spectral_norm`, `prune`) leave the tensor that they computed last at
    their layer, with its history, of which torch makes no copies: the copy gets its numbers, and computes its own at
    its next call.

    Raises:
        InvalidInputError: a lazy layer without weights; a hook or function at a layer that closes over layers of the
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
                    f"no copy can be made of {_called(name, layer)}: it holds the function "
                    f"{getattr(value, '__qualname__', value)}, which closes over the original and would go on with its "
                    "weights; make it a method, or pass the copy yourself, reference=... for a Chain"
                )
    try:
        with torch.inference_mode(False):
            return copy.deepcopy(module, memo)
    except Exception as error:  # whatever parts raise, by kind
        raise InvalidInputError(
            f"no copy can be made of {_called(*_broken(module))}: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}; pass the copy yourself, reference=... for a Chain"
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
    """Run `modules` as functions of what they are given and of their present weights.

    They are in evaluation mode inside the block; afterwards every submodule has its own mode again. An autocast around
    it casts the weights anew at every call.

    What stands for modules is what `modules_in` names; plain functions and None have no mode and are passed over.
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
    """The modules that a callable holds: itself, the owner of a bound method, what a partial was given, attributes.

    Attributes of an instance count as far as two levels down, with lists, tuples and dicts of modules in them. What a
    plain function closes over, or finds among its globals, is out of reach.
    """
    return _modules_in(value, 2)


WITHOUT = (FunctionType, Tensor, float, int, str, NoneType, tuple, list, dict, type, ModuleType)  # the usual, quickly


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
            "gradients are needed here, and torch.inference_mode rules them out; leave it, or take torch.no_grad, "
            "which does no harm"
        )


Refreshed = tuple[nn.Module, str | SpectralNorm]


def parametrizations(module: nn.Module) -> list[Refreshed]:
    """Layers whose tensors are computed from others, with what computes them.

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

    Spectral normalisation iterates its estimate of the norm in training mode only; without this it would go on
    dividing by the norm of the first weights.
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
    """What a layer holds besides its parameters, buffers and parts; containers are looked into once.

    What `torch.compile` made of it is left out: a copy compiles its own.
    """
    if hasattr(layer, "_orig_mod"):
        return
    for name, value in vars(layer).items():
        if name == "_compiled_call_impl":
            continue
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        yield from (value, *inside)


def _closed_over(value: Any) -> Iterator[Any]:
    """What a function keeps of where it was made."""
    while isinstance(value, functools.partial):  # its arguments are copied
        value = value.func
    for cell in getattr(value, "__closure__", None) or ():
        try:
            found = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        yield found
        if isinstance(found, Callable) and not isinstance(found, nn.Module):  # type: ignore[arg-type]
            yield getattr(found, "__self__", None)


def _broken(module: nn.Module) -> tuple[str, nn.Module]:
    """The innermost part of which no copy can be made."""
    for name, part in reversed(list(module.named_modules())):
        try:
            copy.deepcopy(part)
        except Exception:  # as in `copied`
            return name, part
    return "", module


def _called(name: str, layer: nn.Module) -> str:
    return f"layer {name} ({type(layer).__name__})" if name else f"the module ({type(layer).__name__})"
