"""Modules that hold still: frozen copies to compare with, and evaluation mode while a network is a function.

Dropout and BatchNorm's running statistics make u a random function, or one with a memory. Inside samplers and
gradients it has to be one function of (x, t; θ), so networks run in evaluation mode there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from implicit_diffusion.errors import InvalidInputError

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """A deep copy of `module` in evaluation mode whose parameters ask for no gradient.

    Raises:
        InvalidInputError: `module` is no `torch.nn.Module`. Copying a plain function would share the
            parameters that it closes over, and the "frozen" copy would be trained along with the original.
    """
    if not isinstance(module, nn.Module):
        raise InvalidInputError(
            f"frozen_copy: module must be a torch.nn.Module, got {type(module).__name__}; wrap the function "
            "in a module that owns its parameters, or build the frozen copy yourself."
        )
    return copy.deepcopy(module).eval().requires_grad_(False)


@contextmanager
def eval_mode(*modules: object) -> Iterator[None]:
    """Run `modules` in evaluation mode inside the block; afterwards every submodule has its own mode again.

    A bound method stands for its module. Other objects that are no `torch.nn.Module` (plain functions used as
    denoisers, None) have no mode and are passed over.
    """
    owners = (getattr(module, "__self__", module) for module in modules)
    training = [part for owner in owners if isinstance(owner, nn.Module) for part in owner.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def parametrizations(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Layers and the names of their parametrized tensors: those of `torch.nn.utils.parametrizations`."""
    return [
        (layer, name)
        for layer in module.modules()
        if parametrize.is_parametrized(layer)
        for name in layer.parametrizations  # type: ignore[union-attr]
    ]


@torch.no_grad()
def train_once(parametrized: Iterable[tuple[nn.Module, str]]) -> None:
    """Evaluate parametrized tensors once in training mode.

    Spectral normalisation iterates its estimate of the norm in training mode only; without this it would go on
    dividing by the norm of the first weights.
    """
    for layer, name in parametrized:
        parts = list(layer.parametrizations[name])  # type: ignore[index]
        modes = [part.training for part in parts]
        for part in parts:
            part.train()
        getattr(layer, name)
        for part, mode in zip(parts, modes):
            part.train(mode)
