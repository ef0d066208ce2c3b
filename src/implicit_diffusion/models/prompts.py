"""Prompts to embeddings, once: the frozen text encoders fill a table, and are let go before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_type
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.families import WIDTHS
from implicit_diffusion.models.parts import load_model, quiet, refused

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # they look at images
CHUNK = 16  # prompts encoded together


@torch.no_grad()
def embed_prompts(
    checkpoint: Checkpoint, network: nn.Module, prompts: Sequence[str], device: torch.device
) -> dict[str, Float[Tensor, "m ..."]]:
    """The table of `prompts` and, as its last row, of the empty prompt: what stands for no prompt under guidance.

    Args:
        checkpoint: of the text-conditional pipeline, whose text encoders are loaded for this call.
        network: its network, to check the embeddings against.
        prompts: m − 1 of them.
        device: to encode on, and where the table stays.

    Returns:
        the arguments of the network that the pipeline would fill, by name.

    Raises:
        InvalidInputError: no text encoder there, one that cannot be loaded, or one that belongs to another network.
    """
    check_type("checkpoint", checkpoint, Checkpoint, "take load_pretrained(model).checkpoint")
    check_type("network", network, nn.Module, "take the network of the checkpoint")
    if (
        isinstance(prompts, str)
        or not isinstance(prompts, Sequence)
        or not all(isinstance(prompt, str) for prompt in prompts)
    ):
        raise InvalidInputError(f"prompts must be a list of strings, got {one_line(repr(prompts))[:80]}")
    encoders = [part for part in checkpoint.parts if part.startswith("text_encoder")]
    if not encoders:
        raise InvalidInputError(f"prompts: {checkpoint.folder} has no text encoder that could read them")
    family = checkpoint.family
    pipeline = assembled(checkpoint, {family.part: network, "vae": None} | dict.fromkeys(UNUSED))
    for encoder in encoders:
        getattr(pipeline, encoder).to(device)
    texts = [*prompts, ""]
    try:
        parts = [_encode(pipeline, texts[i : i + CHUNK], device) for i in range(0, len(texts), CHUNK)]
        columns = [torch.cat(column).to(device) for column in zip(*parts)]
        table = dict(zip(family.embeddings, columns, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the two libraries raise
        raise InvalidInputError(
            f"model: the text encoders of {checkpoint.folder} cannot encode prompts: {one_line(error)}; are these the "
            "tokenizers that belong to them?"
        ) from error
    _check_width(network, table)
    return table


def assembled(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Any:
    """The pipeline of diffusers: `given` parts, and all others of the checkpoint loaded with their weights checked.

    Raises:
        InvalidInputError: a part that cannot be loaded.
    """
    import diffusers

    pipeline_class: Any = getattr(diffusers, checkpoint.family.pipelines[0])
    slots = inspect.signature(pipeline_class.__init__).parameters.keys()
    given = {part: model for part, model in given.items() if part in slots}
    given |= dict.fromkeys((slots & checkpoint.family.parts) - checkpoint.parts.keys() - given.keys())
    if "requires_safety_checker" in slots and given.get("safety_checker", 0) is None:
        given["requires_safety_checker"] = False
    source = str(checkpoint.folder)
    with checkpoint.laid_out() as folder, quiet():
        for part in checkpoint.parts.keys() - given.keys():
            if (folder / part / "config.json").exists():
                given[part] = load_model(checkpoint, folder, part, part.replace("_", " "), source)
        try:
            return pipeline_class.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **given)
        except Exception as error:  # whatever the two libraries raise, by kind of damage
            raise refused("pipeline", "loaded", error, checkpoint, folder, source) from error


def _encode(pipeline: Any, texts: list[str], device: torch.device) -> list[Tensor]:
    """What the pipeline makes of prompts, without their unconditional counterparts."""
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if hasattr(pipeline, "text_encoder_3"):
        embeddings, _, pooled, _ = pipeline.encode_prompt(texts, None, None, **options)
        return [embeddings, pooled]
    return [pipeline.encode_prompt(texts, **options)[0]]


def _check_width(network: Any, table: dict[str, Tensor]) -> None:
    """The embeddings against the widths that the network's config names, where it names them."""
    for column, keys in WIDTHS.items():
        wanted = next((network.config[key] for key in keys if network.config.get(key) is not None), None)
        if column in table and isinstance(wanted, int) and table[column].shape[-1] != wanted:
            raise InvalidInputError(
                f"model: its text encoders make {column} of width {table[column].shape[-1]}, but its network takes "
                f"{wanted}; they belong to different models"
            )
