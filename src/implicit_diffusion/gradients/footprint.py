"""What one sample costs an estimator in memory, measured on two and on three samples.

Activations are what autograd saves: what grows by a sample is an activation, and what does not, parameters and
constants, is counted elsewhere. Blocks whose activations are computed again in the backward pass (gradient
checkpointing) keep their inputs, and one block at a time has its activations: those of the largest block are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from implicit_diffusion.denoisers.lora import WATCHING
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.samplers.chain import TRIAL, Chain
from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class Footprint(Shown):
    """Bytes per sample, except those of `kept`.

    Args:
        carry: what a trajectory carries on its way back.
        turn: activations of the call in which it turns round.
        pull: activations of one call with gradient, on one row.
        held: activations kept from its whole way forward; zero where only states are kept.
        kept: bytes in all, of what the estimator has learned, for any number of samples.
    """

    carry: int
    turn: int
    pull: int
    held: int = 0
    kept: int = 0


def row_activations(
    chain: Chain, objective: Objective, noise: Noise, *, reference: bool | None = None
) -> tuple[int, int]:
    """Bytes per sample of the activations of network and running costs on one row, and of those of the largest block
    that is computed again in the backward pass.

    The first trained row represents all of them.

    Args:
        chain: the sampler.
        objective: gives the running costs.
        noise: of the conditions.
        reference: whether u_0 is evaluated as well; where there are running costs if None.
    """
    reference = bool(objective.running) if reference is None else reference

    def row(n: int) -> object:
        x = torch.zeros(1, n, *chain.event_shape, device=chain.device, dtype=chain.dtype, requires_grad=True)
        condition = chain.conditions(noise, n, [TRIAL])
        rows = chain.trained_rows[:1] or [0]
        transition = chain.transition(x, rows, reference=reference, condition=condition)
        return [transition.u, transition.u0, *(cost.cost(transition) for _, cost in objective.running)]

    with chain.evaluating(), objective.evaluating():
        return saved_per_sample(row)


def end_activations(chain: Chain, objective: Objective, noise: Noise) -> int:
    """Bytes per sample of the activations of the terminal terms at the end of a trajectory."""

    def end(n: int) -> object:
        x = torch.zeros(n, *chain.event_shape, device=chain.device, dtype=chain.dtype, requires_grad=True)
        particles = chain.endpoint(x, noise, TRIAL)
        return [term.value(particles) for _, term in objective.terminal]

    with chain.evaluating(), objective.evaluating():
        return saved_per_sample(end)[0]


def variation_activations(chain: Chain, objective: Objective, noise: Noise) -> int:
    """Bytes per sample of the activations of the terminal terms' first variations at the end of a trajectory."""

    def end(n: int) -> object:
        particles = chain.endpoint(
            torch.zeros(n, *chain.event_shape, device=chain.device, dtype=chain.dtype), noise, TRIAL
        )
        return [term.first_variation(particles) for weight, term in objective.terminal if weight != 0]

    with chain.evaluating(), objective.evaluating():
        return saved_per_sample(end)[0]


def saved_per_sample(function: Callable[[int], object]) -> tuple[int, int]:
    """Bytes that autograd saves for each sample that `function` is given, and those of its largest block that is
    computed again in the backward pass.
    """

    def saved(n: int) -> tuple[int, list[int]]:
        recomputed: list[int] = []
        WATCHING.append(lambda block: recomputed.append(_saved(block)))
        try:
            return _saved(lambda: function(n)), recomputed
        finally:
            WATCHING.pop()

    (two, blocks), (three, larger) = saved(2), saved(3)  # one sample is special: its reshapes copy nothing
    return three - two, max((b - a for a, b in zip(blocks, larger, strict=True)), default=0)


def bytes_of(event_shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of one event."""
    return torch.empty(tuple(event_shape), dtype=dtype, device="meta").nbytes


def _saved(function: Callable[[], object]) -> int:
    """Bytes that autograd has saved after a call, without branches of the graph that its result does not depend on.

    Those are freed during the call. A weak reference keeps the identity of their storages from being used again.
    """
    storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _graph = function()  # held until everything is counted
    return sum(size for reference, size in storages.values() if not reference.expired())
