"""Potentials of several runs as one function of all their particles.

V_1, …, V_S are the same module with numbers of their own. On particles x with shape (S, n, *event),

    V(x)_s = V_s(x_s),    with shape (S, n),

is one call of the module, `torch.func.functional_call` under `torch.vmap`. V_s depends on nothing of the other runs, so
that one pull of Σ_s V_s holds ∇V of every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.potentials.energy import precision


class StackedPotential:
    """V of all runs, (S, n, *event) → (S, n).

    Args:
        models: the potentials of the runs: the same module, with numbers of their own.
        trained: names of the parameters that an optimizer is to move: they get a stack even where they are equal.

    Attributes:
        trained: these parameters of all runs, with shape (S, *shape).
    """

    def __init__(self, models: Sequence[nn.Module], trained: Sequence[str] = ()) -> None:
        self.model = models[0]
        each = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
        held = {name: [own[name].detach() for own in each] for name in each[0]}
        asked = {name: p.requires_grad for name, p in models[0].named_parameters()}
        self.trained = {name: nn.Parameter(torch.stack(held.pop(name)), asked[name]) for name in trained}
        same = {name for name, (first, *others) in held.items() if all(torch.equal(first, other) for other in others)}
        self.shared = {name: tensors[0] for name, tensors in held.items() if name in same}
        self.fixed = {name: torch.stack(tensors) for name, tensors in held.items() if name not in same}

    def __call__(self, x: Float[Tensor, "runs n *event"]) -> Float[Tensor, "runs n"]:
        dtype = precision(self.model, x)
        if not self.trained and not self.fixed:  # all runs have the same potential
            same: Tensor = self.model(x.flatten(0, 1).to(dtype))
            return same.to(x.dtype).unflatten(0, x.shape[:2])

        def one(own: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.model, self.shared | own, (x,))

        value: Tensor = torch.vmap(one)({**self.trained, **self.fixed}, x.to(dtype))
        return value.to(x.dtype)
