"""What a run will need at least, from models without memory: before any weight is read.

    encoding    the largest text encoder
    training    network + trained parameters, gradients, moments (and u_0) + decoder + states + activations, which are
                those of the network or, where a reward's gradient goes through the decoder, of a piece that it decodes

On an accelerator one comes after the other; the host has the network meanwhile. Activations are those that autograd
saves when the network is evaluated on the meta device, where tensors have shapes and no numbers. There is no autocast
there: in half precision at least half of the bytes remain. So this is a lower bound, and what exceeds the memory cannot
fit; `loops.memory` predicts more closely once the weights are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from implicit_diffusion.denoisers.lora import WithoutAdapter, checkpoint_activations
from implicit_diffusion.denoisers.without_numbers import buffers_on_host, without_numbers
from implicit_diffusion.errors import MemoryLimitError
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.gradients.footprint import bytes_of, saved_per_sample
from implicit_diffusion.loops.memory import free_memory, in_units
from implicit_diffusion.models.decoders import Decoder
from implicit_diffusion.models.pipelines.decoder import PipelineDecoder
from implicit_diffusion.showing import Shown

MOMENTS = 2  # of Adam, per trained number


@dataclass(frozen=True, repr=False)
class Training(Shown):
    """What is trained, and how much there is at a time, in one process.

    Args:
        samples: that one call with gradient serves.
        events: states and adjoints of all trajectories in flight.
        adapt: adds adapters to a network and freezes all other weights, in place; None where all are trained.
        checkpointing: whether activations are computed again for the gradient.
        half: whether layers compute in half precision.
        kept: dtype of frozen weights; at most float32, and float32 where all are trained.
        shares: processes that the weights are shared out over.
        ending: samples that end together and are decoded for the gradient of a reward; 0 where there is none.
    """

    samples: int
    events: int
    adapt: Callable[[nn.Module], object] | None = None
    checkpointing: bool = False
    half: bool = False
    kept: torch.dtype = torch.float32
    shares: int = 1
    ending: int = 0


@dataclass(frozen=True, repr=False)
class Call(Shown):
    """How a network is called.

    Args:
        denoiser: u, around the network.
        of: calls u or u_0 for n samples on the meta device.
        event_shape: of one state.
    """

    denoiser: nn.Module
    of: Callable[[nn.Module, int], object]
    event_shape: Sequence[int]


@dataclass(frozen=True, repr=False)
class Needs(Shown):
    """Bytes, at least.

    Args:
        network: weights of the network in the dtype that they are kept in; with u_0 where it has its own.
        trained: adapters with gradients and moments, or gradients and moments of all weights.
        states: of all trajectories in flight, with their adjoints; None where they are not known.
        activations: kept by autograd during the largest call with gradient; None where they are not known.
        decoder: weights of the decoder.
        decoding: activations of the decoder for the largest piece of samples that it decodes together; None where they
            are not known.
        encoders: weights of every text encoder, by name.
        on_host: whether text encoders compute on the host, also beside an accelerator.
        unknown: why something is not known.
    """

    network: int
    trained: int
    states: int | None
    activations: int | None
    decoder: int = 0
    decoding: int | None = 0
    encoders: Mapping[str, int] = field(default_factory=dict)
    on_host: bool = False
    unknown: str | None = None

    @property
    def encoder(self) -> int:
        """The largest text encoder: they are loaded one after the other."""
        return max(self.encoders.values(), default=0)

    @property
    def training(self) -> int:
        """All parts while the network is trained."""
        return self.network + self.decoder + self._moving

    @property
    def device(self) -> int:
        """Of an accelerator, whose text encoders have gone when the network comes."""
        return self.training if self.on_host else max(self.encoder, self.training)

    @property
    def host(self) -> int:
        """Of the host beside an accelerator."""
        return self.network + self.decoder + self.encoder

    @property
    def alone(self) -> int:
        """Of a host that computes as well."""
        return self.network + self.decoder + max(self.encoder, self._moving)

    @property
    def advice(self) -> str:
        """What would need less."""
        if (self.decoding or 0) > max(self.activations or 0, self.network):
            return (
                "smaller samples, or an estimator that needs no gradient of the reward: most of it is kept by the "
                "decoder, which is inside the reward"
            )
        return "low-rank adapters, gradient checkpointing, a smaller batch or a larger stride of the queue"

    @property
    def _moving(self) -> int:
        return self.trained + (self.states or 0) + max(self.activations or 0, self.decoding or 0)

    def __str__(self) -> str:
        names = ("network", "trained", "states", "activations", "decoder", "decoding")
        sizes = {name: getattr(self, name) for name in names}
        sizes |= {name.replace("_", " "): size for name, size in self.encoders.items()}
        known = ", ".join(f"{name} {in_units(size)}" for name, size in sizes.items() if size)
        return known if self.unknown is None else f"{known}; {self.note}"

    @property
    def note(self) -> str | None:
        """What is not counted, and why; None where all is."""
        if self.unknown is None:
            return None
        missing = " and ".join(name for name in ("states", "activations", "decoding") if getattr(self, name) is None)
        return f"{missing} are not known, and not counted: {self.unknown}"


def needs_of_network(network: nn.Module, call: Call | None, training: Training) -> Needs:
    """What training a network needs at least, without its decoder and its text encoders.

    Args:
        network: on the meta device; it gets adapters and checkpoints here.
        call: see there; None where it is not known how the network is called.
        training: see there.

    Raises:
        InvalidInputError: targets that match no layer; a network without gradient checkpointing.
    """
    numbers = sum(p.numel() for p in network.parameters())
    network.requires_grad_(True)
    if training.adapt is None:
        weights, trained = 2 * weight_bytes(network), (1 + MOMENTS) * 4 * numbers
    else:
        weights = weight_bytes(network, min(training.kept, torch.float32, key=lambda dtype: dtype.itemsize))
        training.adapt(network)
        trained = (2 + MOMENTS) * 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    if training.checkpointing:
        checkpoint_activations(network)
    needs = Needs(network=weights // training.shares, trained=trained // training.shares, states=None, activations=None)
    if call is None:
        return needs
    needs = replace(needs, states=training.events * bytes_of(call.event_shape, torch.float32))
    try:
        u = call.denoiser
        reference = WithoutAdapter(u) if training.adapt is not None else copy.deepcopy(u).requires_grad_(False)
        per_sample = activation_bytes([u, reference], call.of)
    except Exception as error:  # networks raise many
        reason = f"{type(error).__name__}: {one_line(error)}"
        return replace(needs, unknown=f"the network cannot be evaluated without numbers ({reason})")
    return replace(needs, activations=training.samples * per_sample // (2 if training.half else 1))


def with_decoder(needs: Needs, decoder: PipelineDecoder | Decoder, event_shape: Sequence[int], ending: int) -> Needs:
    """The same with the activations of a decoder on the meta device.

    Args:
        needs: without.
        decoder: whose weights are on the meta device.
        event_shape: of one state.
        ending: see `Training`.
    """
    if not ending:
        return needs
    try:
        decoding = decoding_bytes(decoder, event_shape, ending)
    except Exception as error:  # networks raise many
        reason = f"the decoder cannot be evaluated without numbers ({type(error).__name__}: {one_line(error)})"
        return replace(needs, decoding=None, unknown="; ".join(filter(None, (needs.unknown, reason))))
    return replace(needs, decoding=decoding)


def decoding_bytes(decoder: PipelineDecoder | Decoder, event_shape: Sequence[int], ending: int) -> int:
    """Bytes that autograd saves of the largest piece of samples that a decoder on the meta device decodes together.

    They are those of its autoencoder: what surrounds that keeps nothing that grows.
    """

    def without_memory(n: int) -> Any:
        with buffers_on_host(decoder.vae):
            given = decoder.given_to_autoencoder(torch.zeros(n, *event_shape))
        return tree_map_only(Tensor, lambda z: z.to("meta").requires_grad_(z.is_floating_point()), given)

    given, autoencoder = {n: without_memory(n) for n in (2, 3)}, cast(Any, decoder.vae)

    def images(n: int) -> Tensor:
        arguments, options = given[n]
        decoded: Tensor = autoencoder.decode(*arguments, **options)[0]
        return decoded

    with without_numbers():
        per_sample = saved_per_sample(images)[0]
        like = given[2][0][0][0] if isinstance(decoder, Decoder) else images(2)[0]
    return per_sample * decoder.largest_piece(ending, like)


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
                f"{needs.advice}"
            )


def weight_bytes(network: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of all weights and buffers, each in its own dtype, or those of floating-point numbers in `dtype`."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(x.numel() * (dtype if dtype and x.is_floating_point() else x.dtype).itemsize for x in tensors)


def activation_bytes(parts: Sequence[nn.Module], call: Callable[[nn.Module, int], object]) -> int:
    """Bytes per sample that autograd saves of calls of u_θ, and of u_0, on the meta device.

    With those of the largest block that is computed again.
    """
    with without_numbers():
        saved, recomputed = saved_per_sample(lambda n: [call(part, n) for part in parts])
    return saved + recomputed
