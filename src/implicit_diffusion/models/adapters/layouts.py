r"""The key layouts in which ComfyUI and kohya's tools read adapters, from peft's names.

    lora_unet_…_to_q.lora_down.weight, .lora_up.weight, .alpha        kohya: dots become underscores
    diffusion_model.…to_q.lora_down.weight, .lora_up.weight, .alpha   the network's own name, dotted
    transformer.…to_q.lora_A.weight, .lora_B.weight                   names of diffusers; no α, so (α/r) B for B

Which of them a network needs follows from what ComfyUI maps to its own layers (its comfy/lora.py) and from what the
pipeline's loader in diffusers takes, as it is the check: a file is only returned if that loader makes the same
(α/r) B A of it in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.denoisers.low_rank import A, B, LowRank
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.models.adapters.reading import from_loader

ROUNDING = 1e-5  # of the largest number of a layer's (α/r) B A


@dataclass(frozen=True)
class Layout:
    """How a network's layers are called in ComfyUI.

    Args:
        prefix: of every name.
        flat: whether dots become underscores.
        alphas: whether it has entries for α.
        below: the blocks in which names are those of diffusers; empty for all.
        renamed: ends of names that are others there.
    """

    prefix: str
    flat: bool = False
    alphas: bool = False
    below: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)


KOHYA = Layout("lora_unet_", flat=True, alphas=True)
NAMES_OF_DIFFUSERS = Layout("transformer.")
WAN = {
    f"attn{i}.{ours}": f"{kind}_attn.{theirs}"
    for i, kind in ((1, "self"), (2, "cross"))
    for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
} | {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
LAYOUTS = {
    "UNet2DConditionModel": KOHYA,
    "QwenImageTransformer2DModel": KOHYA,
    "ZImageTransformer2DModel": Layout("diffusion_model.", alphas=True),
    "WanTransformer3DModel": Layout("diffusion_model.", alphas=True, below="blocks.", renamed=WAN),
    "LTXVideoTransformer3DModel": Layout("diffusion_model.", below="transformer_blocks."),
    "SD3Transformer2DModel": NAMES_OF_DIFFUSERS,
    "FluxTransformer2DModel": NAMES_OF_DIFFUSERS,
    "Flux2Transformer2DModel": NAMES_OF_DIFFUSERS,
    "AuraFlowTransformer2DModel": NAMES_OF_DIFFUSERS,
    "PixArtTransformer2DModel": NAMES_OF_DIFFUSERS,
}  # by the network's class in diffusers


def converted(adapter: LowRank, network: Any, pipeline_class: Any, part: str) -> dict[str, Tensor]:
    """The entries of an adapter's file in the layout that ComfyUI reads.

    Args:
        adapter: of `network`.
        network: of diffusers.
        pipeline_class: whose loader checks the result, if it has one.
        part: the network's name in the pipeline.

    Raises:
        InvalidInputError: ComfyUI has no such network, or no name for a layer.
    """
    kind = type(network).__name__
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise InvalidInputError(
            f"denoiser: no key layout is known in which ComfyUI reads adapters of {kind}; it is known for "
            f"{', '.join(sorted(LAYOUTS))}"
        )
    names = {layer: _renamed(layer, layout, kind) for layer in adapter.layers}
    entries = _kohya(adapter) if layout.flat else _dotted(adapter, names, layout)
    if hasattr(pipeline_class, "lora_state_dict"):
        try:
            _compare(adapter, from_loader(entries, network, pipeline_class, part))
        except InvalidInputError as error:
            raise InvalidInputError(
                f"denoiser: {pipeline_class.__name__} reads another adapter from it: {error}"
            ) from error
    return entries


def _renamed(layer: str, layout: Layout, kind: str) -> str:
    end = next((end for end in layout.renamed if layer.endswith(f".{end}")), None)
    if not layer.startswith(layout.below) or (layout.renamed and end is None):
        raise InvalidInputError(f"denoiser: no name is known by which ComfyUI calls the layer {layer} of {kind}")
    return layer if end is None else layer.removesuffix(end) + layout.renamed[end]


def _kohya(adapter: LowRank) -> dict[str, Tensor]:
    """By diffusers' own function, which writes r for α."""
    require("diffusers")
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    entries = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in adapter.weights.items()})
    alpha = torch.tensor(float(adapter.alpha))
    return {name: alpha.clone() if name.endswith(".alpha") else entry for name, entry in entries.items()}


def _dotted(adapter: LowRank, names: Mapping[str, str], layout: Layout) -> dict[str, Tensor]:
    entries = {}
    weights = adapter.weights if layout.alphas else adapter.folded()
    down, up = (".lora_down.weight", ".lora_up.weight") if layout.alphas else (A, B)
    for layer, name in names.items():
        entries[layout.prefix + name + down] = weights[layer + A]
        entries[layout.prefix + name + up] = weights[layer + B]
        if layout.alphas:
            entries[f"{layout.prefix}{name}.alpha"] = torch.tensor(float(adapter.alpha))
    return entries


def _compare(ours: LowRank, theirs: LowRank) -> None:
    """Raise where two adapters do not add the same to every layer."""
    if odd := sorted(set(ours.layers) ^ set(theirs.layers)):
        raise InvalidInputError(f"layer {odd[0]} is in one alone")
    for layer in ours.layers:
        added = [_product(each, layer) for each in (ours, theirs)]
        if added[0].shape != added[1].shape or not (added[0] - added[1]).abs().max() <= ROUNDING * added[0].abs().max():
            raise InvalidInputError(f"layer {layer} differs")


def _product(adapter: LowRank, layer: str) -> Tensor:
    down, up = (adapter.weights[layer + end].to(torch.float32).flatten(1) for end in (A, B))
    return adapter.alpha / adapter.rank * (up @ down)
