"""Where the values of a network's arguments are, and how large they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from implicit_diffusion.models.pipelines.arguments import Constant, PerSample, leaves


def placed(roles: Any, device: torch.device) -> Any:
    """Roles whose values are on a device."""
    if isinstance(roles, Constant):
        return Constant(tree_map_only(Tensor, lambda value: value.to(device), roles.value))
    if isinstance(roles, PerSample):
        return PerSample(roles.parts, tree_map_only(Tensor, lambda value: value.to(device), roles.values))
    if isinstance(roles, dict):
        return {key: placed(role, device) for key, role in roles.items()}
    if isinstance(roles, list | tuple):
        return type(roles)(placed(role, device) for role in roles)
    return roles


def bytes_held(roles: Any) -> int:
    """Bytes of the values that roles hold."""
    held = [
        role.value if isinstance(role, Constant) else role.values
        for role in leaves(roles)
        if isinstance(role, Constant | PerSample)
    ]
    return sum(value.nbytes for value in tree_leaves(held) if isinstance(value, Tensor))
