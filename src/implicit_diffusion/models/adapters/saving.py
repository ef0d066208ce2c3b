"""Low-rank adapters as files, for the pipeline that they were trained on.

    pipeline class with a loader      pytorch_lora_weights.safetensors, by its own `save_lora_weights`
    any other                         adapter_model.safetensors and adapter_config.json, the layout of peft
    ComfyUI, kohya's tools            one file in the layout of `layouts`

Rank, α and targets are in the header of the first and in the config of the second: whoever loads W + (α/r) B A gets the
network that was trained. The header names nothing else, since a name that another release of peft does not know would
stop it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from implicit_diffusion.denoisers.low_rank import LowRank, adapter_of
from implicit_diffusion.denoisers.sharded import network_of
from implicit_diffusion.errors import InvalidInputError, check_path, check_type
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.models.adapters.layouts import converted
from implicit_diffusion.processes import main_only

PEFT_WEIGHTS = "adapter_model.safetensors"  # the name that peft looks for
PEFT_PREFIX = "base_model.model."


@main_only
def save_adapter(folder: str | PathLike[str], denoiser: nn.Module, pipeline_class: Any, part: str) -> Path:
    """Write the low-rank adapter of a denoiser, for use with the original pipeline; `adapter_usage` shows how.

    Where the pipeline's class can load adapters, the format is that of diffusers; for the networks of others
    (`UNet2DModel`, DiT, PixArt) it is that of peft.

    Args:
        folder: created if missing.
        denoiser: with an adapter, or its network.
        pipeline_class: of the original pipeline, such as `diffusers.FluxPipeline`; None where it depends on the parts.
        part: the network's name in the pipeline, "unet" or "transformer".

    Returns:
        The folder.

    Raises:
        InvalidInputError: a denoiser without an adapter, or an argument of another kind.
    """
    check_type("denoiser", denoiser, nn.Module, "use one whose network add_lora has changed")
    check_type("part", part, str, 'use "unet" or "transformer"')
    folder, adapter = check_path("folder", folder), _adapter(denoiser)
    network: Any = network_of(denoiser)
    (config,) = network.peft_config.values()
    targets = sorted(config.target_modules)
    if has_loader(pipeline_class, part):
        header = {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": targets}
        given = {f"{part}_lora_layers": dict(adapter.weights), f"{part}_lora_adapter_metadata": header}
        pipeline_class.save_lora_weights(folder, **given, safe_serialization=True)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    replace(config, target_modules=targets).save_pretrained(folder)
    save_file({PEFT_PREFIX + name: weight for name, weight in adapter.weights.items()}, folder / PEFT_WEIGHTS)
    return folder


@main_only
def save_comfyui_adapter(path: str | PathLike[str], denoiser: nn.Module, pipeline_class: Any, part: str) -> Path:
    """Write the low-rank adapter of a denoiser as one file in the key layout that ComfyUI and kohya's tools read.

    Before it is written, it is read again by the pipeline's own loader, and (α/r) B A of every layer is compared.

    Args:
        path: of the file, ending in .safetensors.
        denoiser: with an adapter, or its network.
        pipeline_class: see `save_adapter`.
        part: see `save_adapter`.

    Returns:
        The path.

    Raises:
        InvalidInputError: a denoiser without an adapter; a network that ComfyUI does not have, or layers that have no
            name there.
    """
    check_type("denoiser", denoiser, nn.Module, "use one whose network add_lora has changed")
    path = check_path("path", path)
    if path.suffix != ".safetensors":
        raise InvalidInputError(f"path must end in .safetensors, got {path.name}")
    network: Any = network_of(denoiser)
    write_comfyui_file(path, converted(_adapter(denoiser), network, pipeline_class, part))
    return path


@main_only
def write_comfyui_file(path: Path, entries: Mapping[str, Tensor]) -> None:
    """Write entries that `converted` has made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(dict(entries), temporary, metadata={"format": "pt"})


def _adapter(denoiser: nn.Module) -> LowRank:
    adapter = adapter_of(denoiser)
    if adapter is None:
        raise InvalidInputError(
            f"denoiser {type(denoiser).__name__} has no adapter; call add_lora on its network first"
        )
    return adapter


def adapter_usage(pipeline_class: Any, part: str) -> str:
    """The line of Python that adds an adapter, in the folder "lora", to the original pipeline."""
    if has_loader(pipeline_class, part):
        return 'pipeline.load_lora_weights("lora")'
    return f'peft.PeftModel.from_pretrained(pipeline.{part}, "lora")'


def has_loader(pipeline_class: Any, part: str) -> bool:
    """Whether a class of pipelines of diffusers loads adapters for this part of it.

    Raises:
        InvalidInputError: neither a class nor None.
    """
    if pipeline_class is not None:
        check_type("pipeline_class", pipeline_class, type, "use type(pipeline), or None")
    save = getattr(pipeline_class, "save_lora_weights", None)
    return save is not None and f"{part}_lora_layers" in inspect.signature(save).parameters
