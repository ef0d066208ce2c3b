"""The adapters of a run: new ones, or those that --init-lora goes on from; and what is saved of them.

With --init-lora the reference u_0 is still the network without any adapter (or that of --reference), as in the run that
made them. J = −E[R] + β·KL(path from u_0) is then the same problem, whose optimum dP* ∝ e^{R/β} dP_0 does not depend on
where training starts; the path KL starts at that of the adapters. Were it measured from the adapted network instead, a
second run would raise R/β₁ + R/β₂: for that, give the merged model of the first run as --model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from implicit_diffusion.commands.finetune.specs import NetworkSpec
from implicit_diffusion.commands.shared.usage import OWN_ADAPTER
from implicit_diffusion.denoisers.lora import add_lora
from implicit_diffusion.denoisers.low_rank import LowRank, adapter_of, add_low_rank
from implicit_diffusion.denoisers.sharded import network_of
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.models.adapters.layouts import converted
from implicit_diffusion.models.adapters.reading import read_adapter
from implicit_diffusion.models.adapters.saving import adapter_usage, save_adapter, write_comfyui_file
from implicit_diffusion.models.families import PipelineFamily
from implicit_diffusion.noise import Noise

FOLDER, COMFYUI = "lora", "lora-comfyui.safetensors"  # in the folder of the model


def add_adapters(network: nn.Module, spec: NetworkSpec, noise: Noise, family: PipelineFamily) -> None:
    """Add the adapters that a run trains, in place.

    Args:
        network: without adapters.
        spec: what adapters.
        noise: for new ones.
        family: of the network's pipeline.

    Raises:
        InvalidInputError: see `add_lora`, `read_adapter`, `add_low_rank`; options that the adapters of --init-lora do
            not agree with.
    """
    if spec.init_lora is None:
        assert spec.lora_rank is not None
        add_lora(network, spec.lora_rank, noise, spec.targets, alpha=spec.lora_alpha)
        return
    try:
        adapter = read_adapter(spec.init_lora, network, pipeline_class_of(family), family.part)
        _check_agreement(adapter, spec)
        add_low_rank(network, adapter)
    except InvalidInputError as error:
        raise InvalidInputError(f"--init-lora {spec.init_lora}: {_shortened(error, spec.init_lora)}") from error


def _shortened(error: InvalidInputError, place: Path) -> str:
    return str(error).removeprefix(f"{place}: ").removeprefix("adapter: ")


def _check_agreement(adapter: LowRank, spec: NetworkSpec) -> None:
    """Raise where another rank, α or other layers are asked for than the adapter has."""
    targets = spec.targets
    ends = tuple(f".{end}" for end in targets or ())
    for flag, asked, own in (
        ("--lora-rank", spec.lora_rank, adapter.rank),
        ("--lora-alpha", spec.lora_alpha, adapter.alpha),
    ):
        if asked is not None and asked != own:
            raise InvalidInputError(
                f"its {flag.removeprefix('--lora-')} is {own:g}, not {flag} {asked:g}; leave that out"
            )
    if targets and (odd := [name for name in adapter.layers if not f".{name}".endswith(ends)]):
        raise InvalidInputError(f"it adapts {odd[0]}, which --lora-targets leaves out; leave that out")
    if missing := [end for end in ends if not any(f".{name}".endswith(end) for name in adapter.layers)]:
        raise InvalidInputError(f"it does not adapt {missing[0][1:]}, which --lora-targets names; leave that out")


def for_comfyui(model: nn.Module, family: PipelineFamily) -> dict[str, Tensor] | None:
    """The entries of a trained model's adapters in a file for ComfyUI; None where it has no such network or layers."""
    adapter = adapter_of(model)
    if adapter is None:
        return None
    try:
        return converted(adapter, network_of(model), pipeline_class_of(family), family.part)
    except InvalidInputError:
        return None


def export_adapters(
    folder: Path, model: nn.Module, family: PipelineFamily, comfyui: Mapping[str, Tensor] | None
) -> None:
    """Write the adapters of a trained model: for its pipeline, and the entries of `for_comfyui` where there are any."""
    save_adapter(folder / FOLDER, model, pipeline_class_of(family), family.part)
    if comfyui is not None:
        write_comfyui_file(folder / COMFYUI, comfyui)


def loaded_by(family: PipelineFamily, *, own: bool) -> str:
    """The line of Python that adds the adapters in "lora" to the original pipeline, or to a model of the user's own."""
    return OWN_ADAPTER if own else adapter_usage(pipeline_class_of(family), family.part)


def pipeline_class_of(family: PipelineFamily) -> Any:
    """The class of its pipelines in diffusers; None where it depends on the parts alone."""
    require("diffusers")
    import diffusers

    return getattr(diffusers, family.pipelines[0]) if family.pipelines else None
