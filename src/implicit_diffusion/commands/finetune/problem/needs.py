"""What a run will need at least, from models without memory: before any weight is read.

    encoding    the largest text encoder
    training    network + trained parameters, gradients, moments (and u_0) + decoder + states + activations

On an accelerator one comes after the other; the host has the network meanwhile. Activations are those that autograd
saves when the network is evaluated on the meta device, where tensors have shapes and no numbers. There is no autocast
there: in half precision at least half of the bytes remain. So this is a lower bound, and what exceeds the memory cannot
fit; `loops.memory` predicts more closely once the weights are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from implicit_diffusion.errors import MemoryLimitError
from implicit_diffusion.gradients.footprint import saved_per_sample
from implicit_diffusion.loops.memory import free_memory, in_units
from implicit_diffusion.showing import Shown

PARTS = ("encoder", "network", "trained", "decoder", "states", "activations")


@dataclass(frozen=True, repr=False)
class Needs(Shown):
    """Bytes, at least.

    Args:
        network: weights of the network in the dtype that they are kept in; with u_0 where it has its own.
        trained: adapters with gradients and moments, or gradients and moments of all weights.
        decoder: weights of the decoder.
        encoder: weights of the largest text encoder.
        states: of all trajectories in flight, with their adjoints.
        activations: kept by autograd during the largest call with gradient.
    """

    network: int
    trained: int
    decoder: int
    encoder: int
    states: int
    activations: int

    @property
    def training(self) -> int:
        """All parts while the network is trained."""
        return self.network + self.trained + self.decoder + self.states + self.activations

    @property
    def device(self) -> int:
        """Of an accelerator, whose text encoders have gone when the network comes."""
        return max(self.encoder, self.training)

    @property
    def host(self) -> int:
        """Of the host beside an accelerator."""
        return self.network + self.decoder + self.encoder

    @property
    def alone(self) -> int:
        """Of a host that computes as well."""
        return self.network + self.decoder + max(self.encoder, self.trained + self.states + self.activations)

    def __str__(self) -> str:
        return ", ".join(f"{name} {in_units(getattr(self, name))}" for name in PARTS)


def check_needs(needs: Needs, device: torch.device, available: dict[str, int | None] | None = None) -> None:
    """Refuse what cannot fit.

    Args:
        needs: see there.
        device: where the network computes.
        available: free bytes by type of device, in place of what the devices report; None where it is unknown.

    Raises:
        MemoryLimitError: a device or the host has less.
    """
    places = {"cpu": needs.alone} if device.type == "cpu" else {device.type: needs.device, "cpu": needs.host}
    for kind, needed in places.items():
        free = free_memory(torch.device(kind) if kind != device.type else device) if available is None else None
        free = free if available is None else available.get(kind)
        if free is not None and needed > free:
            raise MemoryLimitError(
                f"the run will not fit: {kind} has {in_units(free)} free, and it needs at least {in_units(needed)} "
                f"there ({needs}), by its config and the headers of its weights, which have not been read; use "
                "low-rank adapters, gradient checkpointing, a smaller batch or a larger stride of the queue"
            )


def weight_bytes(network: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of all weights and buffers, each in its own dtype or all in `dtype`."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(x.numel() * (x.dtype if dtype is None else dtype).itemsize for x in tensors)


def activation_bytes(networks: Sequence[Callable[[int], object]]) -> int:
    """Bytes per sample that autograd saves of calls on n samples on the meta device, such as those of u_θ and u_0.

    With those of the largest block that is computed again.
    """
    saved, recomputed = saved_per_sample(lambda n: [network(n) for network in networks])
    return saved + recomputed
