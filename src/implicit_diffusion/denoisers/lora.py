r"""Low-rank adapters: few trained numbers, and u_0 without a second copy of the weights.

A linear (or convolutional) layer W of the network becomes W + (α/r) B A, where only A: in → r and B: r → out are
trained (Hu et al., *LoRA*, arXiv 2106.09685). B starts at zero, so u_θ starts as u_0; and since W does not change, u_0
is the same module with its adapters switched off (`WithoutAdapter`). There is no dropout: u_θ is a function.

With gradient checkpointing the network is recomputed in the backward pass, when the adapters may be on although they
were off in the forward pass, or the reverse. So every checkpoint stores whether they were on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from implicit_diffusion.denoisers.adapter import unwrapped
from implicit_diffusion.denoisers.half_weights import reads_in_single, single_copy
from implicit_diffusion.errors import InvalidInputError, check_integer, check_number, check_type, shown
from implicit_diffusion.extras import require
from implicit_diffusion.frozen import copied
from implicit_diffusion.noise import Noise
from implicit_diffusion.rounding import at_least_single
from implicit_diffusion.showing import ShownModule, brief

ADAPTABLE = (nn.Linear, nn.Conv2d)
ATTENTION, RESIDUAL = ("to_q", "to_k", "to_v", "to_out.0"), ("conv1", "conv2")


def add_lora(
    network: nn.Module, rank: int, noise: Noise, targets: Sequence[str] | None = None, *, alpha: float | None = None
) -> None:
    """Add adapters to layers of `network`, in place, and freeze all other weights.

    Args:
        network: a diffusers model.
        rank: r.
        noise: for the initial A.
        targets: ends of the layers' names; by default those of the projections of attention or, in a network without
            attention, of the convolutions in residual blocks.
        alpha: α, by default r, so that the factor α/r is one. Under Adam it multiplies the step of B A.

    Raises:
        InvalidInputError: a rank below one; an alpha that is not positive and finite; targets that match no layer that
            can be adapted.
        MissingExtraError: peft is not installed.
    """
    require("peft")
    import peft

    check_type("network", network, nn.Module, "use the model of a denoiser")
    check_type("noise", noise, Noise, "use Noise(0), for example")
    rank = check_integer("rank", rank)
    alpha = rank if alpha is None else check_number("alpha", alpha, 0)
    if targets is not None and (
        not isinstance(targets, Sequence)
        or isinstance(targets, str)
        or not all(isinstance(end, str) for end in targets)
    ):
        raise InvalidInputError(f"targets must be a list of ends of layers' names, got {shown(targets)}")
    layers = {name: part for name, part in network.named_modules() if isinstance(part, ADAPTABLE)}
    if targets is None:
        attends = any(name.endswith(ATTENTION[0]) for name in layers)
        targets = ATTENTION if attends else RESIDUAL
    missing = [end for end in targets if not any(name == end or name.endswith(f".{end}") for name in layers)]
    if missing or not targets:
        ends = sorted({_end(name) for name in layers})
        raise InvalidInputError(
            f"targets: no layer of the network is called {', '.join(missing) or 'nothing'}; among those that "
            f"can be adapted are {', '.join(ends[:12])}"
        )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator; it is drawn again below
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        peft.inject_adapter_in_model(config, network)
    for key, (name, parameter) in enumerate(network.named_parameters()):
        if parameter.requires_grad:
            parameter.data = parameter.data.to(at_least_single(parameter.dtype))  # peft takes that of the layer
        if "lora_A" in name:
            bound = math.sqrt(1 / parameter[0].numel())  # as nn.Linear does
            uniform = torch.rand(parameter.shape, generator=noise.generator(key), dtype=torch.float64)
            parameter.data.copy_(bound * (2 * uniform - 1))


def _end(name: str) -> str:
    """The last word of a layer's name, or the last two where it is a number: "to_out.0"."""
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() and len(words) > 1 else words[-1]


class WithoutAdapter(ShownModule):
    """u_0: the same denoiser with its adapters switched off; all weights are shared.

    Args:
        denoiser: whose network has adapters.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        check_type("denoiser", denoiser, nn.Module, "its network has adapters")
        self.denoiser = denoiser

    def _words(self) -> Iterable[str]:
        return (brief(self.denoiser),)

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Any
    ) -> Float[Tensor, "batch *event"]:
        """u_0(x, t, **condition)."""
        with _switched(self.denoiser, on=False):
            return self.denoiser(x, t, **condition)


def layers_with_adapters(module: nn.Module) -> list[Any]:
    """The layers with adapters, by their attributes, without importing peft."""
    return [part for part in module.modules() if hasattr(part, "lora_A") and hasattr(part, "enable_adapters")]


@contextmanager
def _switched(module: nn.Module, *, on: bool) -> Iterator[None]:
    layers = layers_with_adapters(module)
    before = [not layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = not on  # `enable_adapters` would also change requires_grad
        yield
    finally:
        for layer, was in zip(layers, before):
            layer._disable_adapters = not was


WATCHING: list[Callable[[Callable[[], Any]], None]] = []  # called with every block that will be recomputed


def checkpoint_activations(network: Any) -> None:
    """Keep only the inputs of the network's blocks, and recompute their activations in the backward pass.

    Raises:
        InvalidInputError: the network's class has no gradient checkpointing.
    """
    check_type("network", network, nn.Module, "use the model of a denoiser")
    if not hasattr(network, "enable_gradient_checkpointing"):
        raise InvalidInputError(
            f"network: {type(network).__name__} is not a model of diffusers, and has no gradient checkpointing"
        )

    def recomputed(block: nn.Module, *arguments: Any) -> Any:
        layers = layers_with_adapters(block)
        on = not layers or not layers[0].disable_adapters

        def run(*given: Any) -> Any:
            with _switched(block, on=on):
                return block(*given)

        if not torch.compiler.is_compiling():
            for watch in WATCHING:
                watch(lambda: run(*arguments))
        return checkpoint(run, *arguments, use_reentrant=False)

    try:
        network.enable_gradient_checkpointing(recomputed)
    except ValueError as error:
        raise InvalidInputError(f"network: it has no gradient checkpointing: {error}") from error


def merged(denoiser: nn.Module) -> nn.Module:
    """A copy of the `DiffusersDenoiser` inside, with its adapters added to the weights and removed.

    Weights of half precision become float32, since a sum rounded to half precision would be another network; that copy
    is on the CPU.
    """
    check_type("denoiser", denoiser, nn.Module, "use a DiffusersDenoiser")
    inner: Any = unwrapped(denoiser)
    result: Any = single_copy(inner) if reads_in_single(inner) else copied(inner)
    if layers_with_adapters(result):
        require("diffusers")
        from diffusers.utils.peft_utils import recurse_remove_peft_layers

        for layer in layers_with_adapters(result):
            layer.merge()
        recurse_remove_peft_layers(result.model)
        result.model.__dict__.pop("peft_config", None)
        result.requires_grad_(True)
    return result
