"""Encode prompts once: frozen text encoders fill a table of embeddings, and are freed before anything is trained.

One encoder is in memory at a time (`_filled`), and of the embeddings one batch (`EmbeddingTable`).
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.denoisers.embedding_table import EmbeddingTable, EmbeddingWriter
from implicit_diffusion.denoisers.without_numbers import hollow
from implicit_diffusion.errors import InvalidInputError, MissingExtraError, check_type
from implicit_diffusion.extras import require
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.code_refusals import part_class
from implicit_diffusion.models.families import WIDTHS
from implicit_diffusion.models.parts import load_model, quiet, refused, without_memory
from implicit_diffusion.models.pipelines.cutting import warn_of_cuts

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts for images, not needed for prompts
UNNAMED = {"self", "args", "kwargs"}
CHUNK = 16  # prompts encoded together


@torch.no_grad()
def embed_prompts(
    checkpoint: Checkpoint, network: nn.Module, prompts: Sequence[str], device: torch.device
) -> EmbeddingTable:
    """The embeddings of `prompts` and, as the last row, of the empty prompt, which guidance needs.

    Args:
        checkpoint: of the text-conditional pipeline, whose text encoders are loaded for this call, one at a time.
        network: of the pipeline; the embeddings are checked against its widths.
        prompts: m − 1 of them; those that occur several times are encoded once.
        device: to encode on.

    Returns:
        The embeddings by the name of the network's argument, each with shape (m, ...): on the host, or in a temporary
        file where they are large.

    Raises:
        InvalidInputError: the pipeline has no text encoder, one cannot be loaded or belongs to another network, or
            `prompts` are not strings.
        MissingExtraError: diffusers or transformers is not installed.

    Warns of prompts that are longer than an encoder reads, and of what is cut of them.
    """
    check_type("checkpoint", checkpoint, Checkpoint, "use load_pretrained(model).checkpoint")
    check_type("network", network, nn.Module, "use the network of the checkpoint")
    if (
        isinstance(prompts, str)
        or not isinstance(prompts, Sequence)
        or not all(isinstance(prompt, str) for prompt in prompts)
    ):
        raise InvalidInputError(f"prompts must be a list of strings, got {one_line(repr(prompts))[:80]}")
    encoders = [part for part in checkpoint.parts if part.startswith("text_encoder")]
    if not encoders:
        raise InvalidInputError(
            f"prompts: {checkpoint.folder} has no text encoder to encode them; use a text-conditional pipeline"
        )
    texts = [*prompts, ""]
    distinct = list(dict.fromkeys(texts))
    try:
        table = _filled(checkpoint, network, encoders, distinct, device)
    except (torch.OutOfMemoryError, InvalidInputError, MissingExtraError):
        raise
    except Exception as error:  # diffusers and transformers raise many
        raise InvalidInputError(
            f"model: the text encoders of {checkpoint.folder} cannot encode prompts: {one_line(error)}; are these the "
            "tokenizers that belong to them?"
        ) from error
    _check_width(network, table)
    place = {text: row for row, text in enumerate(distinct)}
    return EmbeddingTable(table, torch.tensor([place[text] for text in texts]))


def _filled(
    checkpoint: Checkpoint, network: nn.Module, encoders: Sequence[str], texts: list[str], device: torch.device
) -> dict[str, Tensor]:
    """The columns of distinct texts: each encoder in turn is loaded, adds its part to all rows, and is released.

    The others meanwhile answer zeros of the shape that they would answer. A pipeline puts the answers of its encoders
    side by side, so the sum over the encoders is what it makes of all together, exactly.
    """
    family, source = checkpoint.family, str(checkpoint.folder)
    with checkpoint.laid_out() as folder:
        silent = {
            part: without_memory(checkpoint, folder, part, part.replace("_", " "), source)[0] for part in encoders
        }
        for encoder in silent.values():
            hollow(encoder, device)
        pipeline = assembled(checkpoint, {family.part: network, "vae": None} | dict.fromkeys(UNUSED) | silent)
        warn_of_cuts(pipeline, texts)
        table = None
        if len(encoders) > 1 and any(value.any() for value in _encode(pipeline, texts[:1], device)):
            raise ValueError("what its pipeline makes of several encoders is not their answers side by side")
        for part in encoders:
            encoder = load_model(checkpoint, folder, part, part.replace("_", " "), source).to(device)
            setattr(pipeline, part, encoder)
            for first in range(0, len(texts), CHUNK):
                values = dict(zip(family.embeddings, _encode(pipeline, texts[first : first + CHUNK], device)))
                if table is None:
                    table = EmbeddingWriter({name: (len(texts), *value.shape[1:]) for name, value in values.items()})
                table.add(first, values)
            setattr(pipeline, part, silent[part])
            del encoder
            gc.collect()  # modules refer to each other
    assert table is not None
    return table.columns


def assembled(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Any:
    """The diffusers pipeline of a checkpoint, with the parts in `given`; the other parts are loaded and checked.

    Raises:
        InvalidInputError: a part that cannot be loaded.
    """
    require("diffusers")
    import diffusers

    pipeline_class: Any = getattr(diffusers, checkpoint.family.pipelines[0])
    parameters = inspect.signature(pipeline_class.__init__).parameters
    slots = parameters.keys()
    given = {part: model for part, model in given.items() if part in slots}
    required = {name for name, each in parameters.items() if each.default is each.empty} - UNNAMED
    empty = required if checkpoint.family.probed else slots & checkpoint.family.parts
    given |= dict.fromkeys(empty - checkpoint.parts.keys() - given.keys())
    if "requires_safety_checker" in slots and given.get("safety_checker", 0) is None:
        given["requires_safety_checker"] = False
    source = str(checkpoint.folder)
    with checkpoint.laid_out() as folder, quiet():
        for part in checkpoint.parts.keys() - given.keys():
            if (folder / part / "config.json").exists():
                given[part] = load_model(checkpoint, folder, part, part.replace("_", " "), source)
        try:
            for part in checkpoint.parts.keys() - given.keys() - {"scheduler"}:
                part_class(part, *checkpoint.parts[part])
            return pipeline_class.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **given)
        except Exception as error:  # as above
            raise refused("pipeline", "loaded", error, checkpoint, folder, source) from error


def _encode(pipeline: Any, texts: list[str], device: torch.device) -> list[Tensor]:
    """The pipeline's embeddings of prompts, without those of the unconditional half."""
    options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if hasattr(pipeline, "text_encoder_3"):
        embeddings, _, pooled, _ = pipeline.encode_prompt(texts, None, None, **options)
        return [embeddings, pooled]
    return [pipeline.encode_prompt(texts, **options)[0]]


def _check_width(network: Any, table: dict[str, Tensor]) -> None:
    """Raise `InvalidInputError` where embeddings differ in width from those that the network's config asks for."""
    for column, keys in WIDTHS.items():
        wanted = next((network.config[key] for key in keys if network.config.get(key) is not None), None)
        if column in table and isinstance(wanted, int) and table[column].shape[-1] != wanted:
            raise InvalidInputError(
                f"model: its text encoders make {column} of width {table[column].shape[-1]}, but its network needs "
                f"{wanted}; they belong to different models"
            )
