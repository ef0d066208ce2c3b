"""Low-rank adapters as files, for the pipeline that they were trained on."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from implicit_diffusion.denoisers.adapter import unwrapped
from implicit_diffusion.denoisers.lora import adapter_of
from implicit_diffusion.errors import InvalidInputError, check_path, check_type
from implicit_diffusion.extras import require
from implicit_diffusion.models.families import PipelineFamily
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.processes import main_only

PEFT_WEIGHTS = "adapter_model.safetensors"  # the name that peft looks for


@main_only
def save_adapter(folder: str | PathLike[str], denoiser: nn.Module, original: Pretrained) -> Path:
    """Write the low-rank adapter of a denoiser, for use with the original pipeline; `adapter_usage` shows how.

    Where the pipeline can load adapters, the format is that of diffusers; for the networks of others (`UNet2DModel`,
    DiT) it is that of peft, `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: created if missing.
        denoiser: with an adapter.
        original: what `load_pretrained` returned.

    Returns:
        The folder.

    Raises:
        InvalidInputError: a denoiser without an adapter.
    """
    check_type("denoiser", denoiser, nn.Module, "use one whose network add_lora has changed")
    folder, adapter, family = check_path("folder", folder), adapter_of(denoiser), original.family
    if adapter is None:
        raise InvalidInputError(
            f"denoiser {type(denoiser).__name__} has no adapter; call add_lora on its network first"
        )
    pipeline_class = _pipeline_class(family)
    if hasattr(pipeline_class, "save_lora_weights"):
        pipeline_class.save_lora_weights(folder, **{f"{family.part}_lora_layers": adapter}, safe_serialization=True)
        return folder
    network: Any = unwrapped(denoiser)
    (config,) = network.model.peft_config.values()
    folder.mkdir(parents=True, exist_ok=True)
    replace(config, target_modules=sorted(config.target_modules)).save_pretrained(folder)
    save_file({f"base_model.model.{name}": weight for name, weight in adapter.items()}, folder / PEFT_WEIGHTS)
    return folder


def adapter_usage(family: PipelineFamily) -> str:
    """The line of Python that adds an adapter, in the folder "lora", to the original pipeline."""
    if hasattr(_pipeline_class(family), "load_lora_weights"):
        return 'pipeline.load_lora_weights("lora")'
    return f'peft.PeftModel.from_pretrained(pipeline.{family.part}, "lora")'


def _pipeline_class(family: PipelineFamily) -> Any:
    """The class of its pipelines in diffusers; None where it depends on the parts alone."""
    require("diffusers")
    import diffusers

    return getattr(diffusers, family.pipelines[0]) if family.pipelines else None
