"""The numbers of an adapter by themselves: every adapted layer computes with W + (α/r) B A.

What is saved, loaded and converted is this, whatever a file calls its entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from implicit_diffusion.denoisers.lora import ADAPTABLE, add_lora, layers_with_adapters
from implicit_diffusion.denoisers.sharded import network_of
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import Shown

A, B = ".lora_A.weight", ".lora_B.weight"  # ends of names, as peft has them


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Shown):
    """An adapter of a network.

    Args:
        weights: A and B of every layer, "layer.lora_A.weight" and "layer.lora_B.weight", on the CPU.
        rank: r, of all layers.
        alpha: α, of all layers.
    """

    weights: Mapping[str, Tensor]
    rank: int
    alpha: float

    def _words(self) -> Iterable[str]:
        yield f"{len(self.layers)} layers"
        yield f"rank={self.rank}"
        yield f"alpha={self.alpha:g}"

    @property
    def layers(self) -> list[str]:
        """The names of the adapted layers."""
        return sorted(name.removesuffix(A) for name in self.weights if name.endswith(A))

    def folded(self) -> dict[str, Tensor]:
        """The weights with (α/r) B in the place of B, for readers that know of no α."""
        scale = self.alpha / self.rank
        return {name: weight * scale if name.endswith(B) else weight for name, weight in self.weights.items()}


def adapter_of(denoiser: nn.Module) -> LowRank | None:
    """The adapter of a denoiser, or of a network itself; None if it has none."""
    known = rank_and_alpha(denoiser)
    if known is None:
        return None
    require("peft")
    import peft

    network: Any = network_of(denoiser)
    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(network)
    return LowRank({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, *known)


def rank_and_alpha(denoiser: nn.Module) -> tuple[int, float] | None:
    """The rank and α of its adapter, without its weights; None if it has none."""
    network: Any = network_of(denoiser)
    if not layers_with_adapters(network):
        return None
    (config,) = network.peft_config.values()
    return config.r, float(config.lora_alpha)


def add_low_rank(network: nn.Module, adapter: LowRank) -> None:
    """Add an adapter to `network`, in place, and freeze all other weights, as `add_lora` does for a new one.

    Raises:
        InvalidInputError: it is of another network: layers that `network` does not have, or of other sizes.
    """
    layers = {name: part for name, part in network.named_modules() if isinstance(part, ADAPTABLE)}
    if strangers := [name for name in adapter.layers if name not in layers]:
        raise InvalidInputError(
            f"adapter: it is of another network: it adapts {_listed(strangers)}; {type(network).__name__} has no such "
            f"layer, it has {_listed(sorted(layers))}"
        )
    for name in adapter.layers:
        shape = layers[name].weight.shape
        wanted = {A: (adapter.rank, *shape[1:]), B: (shape[0], adapter.rank, *[1] * (len(shape) - 2))}
        for end, size in wanted.items():
            if (given := tuple(adapter.weights[name + end].shape)) != size:
                raise InvalidInputError(
                    f"adapter: it is of another network: {name}{end} has shape {given}, and the layer needs {size}"
                )
    ends = [f".{name}" for name in adapter.layers]
    if more := [name for name in layers if name not in adapter.layers and name.endswith(tuple(ends))]:
        raise InvalidInputError(
            f"adapter: it leaves out {_listed(more)}, whose names end like those of layers that it adapts; peft cannot "
            "tell them apart"
        )
    add_lora(network, adapter.rank, Noise(0), adapter.layers, alpha=adapter.alpha)
    parameters = dict(network.named_parameters())
    for name, weight in adapter.weights.items():
        layer, _, _ = name.rpartition(".")
        parameters[f"{layer}.default.weight"].data.copy_(weight)


def _listed(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
