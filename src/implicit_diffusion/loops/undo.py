"""A step of the optimizer that can be taken back.

An optimizer may make NaN of a sound gradient: Adam's eps of 1e−8 is 0 in float16, and a gradient of zero gives 0/0. So
θ is looked at after the step, in the one number that is read anyway, and goes back to what it was unless it is finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from implicit_diffusion.rounding import at_least_single


class Before:
    """θ and the optimizer's state as they are before a step, to go back to.

    Args:
        optimizer: whose state it is.
        moved: the parameters that the step moves.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer, moved: Sequence[Tensor]) -> None:
        self.optimizer = optimizer
        self.entries = {p: dict(s) if isinstance(s, Mapping) else s for p, s in optimizer.state.items()}
        state = (t for s in self.entries.values() if isinstance(s, dict) for t in s.values() if isinstance(t, Tensor))
        self.held = [*moved, *state]
        self.copies = [t.clone() for t in self.held]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back; what the step put into the state besides is dropped."""
        for t, copy in zip(self.held, self.copies):
            t.copy_(copy)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.entries)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest |entry| of all; NaN where one is. Unlike a norm it does not overflow by itself."""
    found = torch.nn.utils.get_total_norm(tensors, math.inf, foreach=False if torch.compiler.is_compiling() else None)
    return found.to(at_least_single(found.dtype))
