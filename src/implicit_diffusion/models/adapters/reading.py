"""Low-rank adapters from files: safetensors in the layouts of diffusers, peft, kohya's tools and ComfyUI.

    adapter_model.safetensors        peft: names as they are, r and α from adapter_config.json
    any other .safetensors           the pipeline's own `lora_state_dict` of diffusers, which knows the other layouts

Only tensors, and numbers of JSON, are read: no pickle, and no class that a config names. Where diffusers moves the
factor α/r into the weights when it converts a layout, α is r afterwards.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from implicit_diffusion.denoisers.low_rank import A, B, LowRank, add_low_rank
from implicit_diffusion.errors import InvalidInputError, check_number, check_path, check_type
from implicit_diffusion.extras import require
from implicit_diffusion.files.foreign import inside
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.files.tensors import load_tensors
from implicit_diffusion.models.pipeline_files import PICKLES, listing

PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
SAFE = "convert it to safetensors where you trust it"
HEADER = "lora_adapter_metadata"  # of diffusers


def load_adapter(folder: str | PathLike[str], network: nn.Module, pipeline_class: Any, part: str) -> None:
    """Add a saved low-rank adapter to `network`, in place, and freeze all other weights.

    Args:
        folder: that `save_adapter` or a tool of diffusers or peft has written, or a single .safetensors file.
        network: of the original pipeline, without adapters.
        pipeline_class: see `save_adapter`.
        part: see `save_adapter`.

    Raises:
        InvalidInputError: see `read_adapter`; an adapter of another network.
    """
    check_type("network", network, nn.Module, "use the model of a denoiser")
    place = check_path("folder", folder)
    adapter = read_adapter(place, network, pipeline_class, part)
    try:
        add_low_rank(network, adapter)
    except InvalidInputError as error:
        raise InvalidInputError(f"{place}: {error}") from error


def read_adapter(place: Path, network: Any, pipeline_class: Any, part: str) -> LowRank:
    """An adapter as it was saved; arguments as in `load_adapter`.

    Raises:
        InvalidInputError: no adapter is there, only a pickled one, or several; damaged files; other kinds of adapters
            (DoRA, LoKr); adapters of text encoders as well; ranks or α that differ between layers or are not positive;
            numbers that are not finite.
    """
    path = _file_of(place)
    tensors, header = load_tensors(path)
    try:
        if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise InvalidInputError(f"{wrong[0]} holds NaN or infinity")
        if path.name == PEFT_WEIGHTS:
            return _from_peft(tensors, read_json(inside(path.parent, path.parent / PEFT_CONFIG)))
        if not hasattr(pipeline_class, "lora_state_dict"):
            name = getattr(pipeline_class, "__name__", "this pipeline")
            raise InvalidInputError(f"{name} loads no adapters in diffusers; use the layout of peft, {PEFT_WEIGHTS}")
        return from_loader(tensors, network, pipeline_class, part, _from_header(header, part))
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error


def _from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if config.get("peft_type") != "LORA":
        raise InvalidInputError(f"{PEFT_CONFIG} describes another kind of adapter than LoRA")
    return _checked({name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}, _alpha(config))


def from_loader(
    tensors: Mapping[str, Tensor], network: Any, pipeline_class: Any, part: str, alpha: float | None = None
) -> LowRank:
    """The adapter that the loader of a pipeline makes of the entries of a file.

    Args:
        tensors: in any layout that it knows.
        network: of the pipeline.
        pipeline_class: with a loader.
        part: the network's name in the pipeline.
        alpha: α, where it is known from elsewhere.

    Raises:
        InvalidInputError: as `read_adapter`.
    """
    require("diffusers")
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    _check_entries(tensors)
    options: dict[str, Any] = {"unet_config": network.config} if part == "unet" else {}
    if "return_alphas" in inspect.signature(pipeline_class.lora_state_dict).parameters:
        options["return_alphas"] = True
    try:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}  # some converters multiply in place
        result = pipeline_class.lora_state_dict(copies, **options)
    except Exception as error:  # its converters raise many, depending on what they miss
        raise InvalidInputError(f"{pipeline_class.__name__} cannot read it: {one_line(error)}") from error
    state, alphas = result if isinstance(result, tuple) else (result, None)
    weights = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
    if others := sorted(name for name in state if not name.startswith(f"{part}.")):
        raise InvalidInputError(f"{listing(others, 3)} are not of the pipeline's {part}, which alone is trained here")
    if not any(name.endswith(A) for name in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    described = {float(alpha) for alpha in (alphas or {}).values()}
    if len(described) > 1:
        raise InvalidInputError(f"alpha differs between its layers: {', '.join(f'{a:g}' for a in sorted(described))}")
    return _checked(weights, described.pop() if described else alpha)


def _check_entries(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what converters would leave out with a warning, and an α at which some of them never end."""
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            if tensor.numel() != 1 or not 0 < float(tensor) < math.inf:
                raise InvalidInputError(f"{name} must be a positive number, got {tensor.flatten()[:3].tolist()}")
        elif "lora" not in name or not name.endswith(".weight"):
            raise InvalidInputError(f"{name} belongs to another kind of adapter than LoRA without biases")


def _file_of(place: Path) -> Path:
    """The one file with an adapter in a folder, or the file itself."""
    if place.is_file():
        if place.name.endswith(PICKLES):
            raise InvalidInputError(f"{place} is a pickle, and loading one can run any code; {SAFE}")
        return place
    if not place.is_dir():
        raise InvalidInputError(f"{place} is not a folder with an adapter, nor a .safetensors file")
    names = sorted(path.name for path in place.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    for known in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS):
        if known in files:
            return inside(place, place / known)
    if len(files) == 1:
        return inside(place, place / files[0])
    if files:
        raise InvalidInputError(f"{place} holds several files, {listing(files)}; name one of them")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise InvalidInputError(f"{place} holds a pickle, {pickles[0]}, and loading one can run any code; {SAFE}")
    raise InvalidInputError(f"{place} holds no .safetensors file with an adapter; it holds {listing(names)}")


def _from_header(header: Mapping[str, str], part: str) -> float | None:
    """α in the header that diffusers writes; None where it has none."""
    try:
        config = json.loads(header.get(HEADER, "{}"))
        own = {name.removeprefix(f"{part}."): value for name, value in config.items() if name.startswith(f"{part}.")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"its header {HEADER} is damaged ({one_line(error)})") from error
    return _alpha(own)


def _alpha(config: Mapping[str, Any]) -> float | None:
    """α of a config of peft, such that the factor is α/r; None where it has none."""
    if config.get("use_dora") or config.get("alpha_pattern") or config.get("rank_pattern"):
        raise InvalidInputError("its layers have ranks or alphas of their own, or it is a DoRA; neither is supported")
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if alpha is None:
        return None
    alpha, rank = (check_number(name, value, 0) for name, value in (("its lora_alpha", alpha), ("its r", rank)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # whose factor is α/√r


def _checked(weights: Mapping[str, Tensor], alpha: float | None) -> LowRank:
    """The adapter of these weights under peft's names; α is r where it is None."""
    for name in weights:
        end = next((end for end in (A, B) if name.endswith(end)), None)
        if end is None or name.removesuffix(end) + (B if end == A else A) not in weights:
            raise InvalidInputError(f"{name} is not one of the two matrices of a low-rank adapter, A and B of a layer")
    ranks = {len(weights[name]) for name in weights if name.endswith(A)}
    if len(ranks) != 1 or 0 in ranks:
        raise InvalidInputError(f"its layers must have one positive rank, they have {sorted(ranks)}")
    (rank,) = ranks
    alpha = float(rank) if alpha is None else alpha
    if not 0 < alpha < math.inf:
        raise InvalidInputError(f"its alpha must be positive and finite, got {alpha:g}")
    return LowRank(dict(weights), rank, alpha)
