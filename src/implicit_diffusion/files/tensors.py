"""Tensors in one safetensors file with their checksums in its header, so that it may be passed on by itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import replacing

DIGESTS = "sha256"


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write contiguous tensors on the CPU and a header with their digests, in one step."""
    digests = json.dumps([_digest_of_header(header), {name: _digest(tensor) for name, tensor in tensors.items()}])
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header | {DIGESTS: digests})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file, checked against its digests if it has any.

    Raises:
        InvalidInputError: the file is missing or damaged; the message names the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            # safe_open maps the file; a copy outlives it and may be written to
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if DIGESTS in header:
            of_header, of_tensors = json.loads(header[DIGESTS])
            if of_header != _digest_of_header({k: v for k, v in header.items() if k != DIGESTS}):
                raise ValueError("its header is not what was written")
            for name in tensors.keys() | of_tensors.keys():
                if name not in tensors or of_tensors.get(name) != _digest(tensors[name]):
                    raise ValueError(f"tensor {name!r} is not what was written: its checksum differs")
    # sizes in a header may overflow, or exceed the memory
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        raise InvalidInputError(f"{path} is damaged: {error}") from error
    return tensors, header


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_header(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
