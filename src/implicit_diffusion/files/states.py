"""States on disk: one safetensors file whose header holds the tree and whose body holds the tensors.

A state is what `state_dict()` returns: dicts (keys str or int), lists and tuples of tensors, numbers, strings,
booleans and None. In the header's JSON a tree reads

    tensor  {"tensor": "0"}              dict   {"dict": [[key, tree], ...]}     keys keep their type
    list    {"list": [tree, ...]}        tuple  {"tuple": [tree, ...]}
    float   1.5 or {"float": "nan"}      str, int, bool and None as themselves

so nothing in it can be executed. Since one file is renamed into place, it is never half an old state and half a new
one, however the process ends. The header also holds SHA-256 digests, of every tensor with its dtype and shape and of
the header itself, so that a bit that has flipped on the disk is detected when the file is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, NonFiniteError, check_path
from implicit_diffusion.files.atomic import replacing, writing
from implicit_diffusion.processes import main_only

STATE_FILE = "state.safetensors"
WITHOUT_DIGESTS = "implicit-diffusion state"  # of releases before 0.2
HEADER = "implicit-diffusion state 2"
DIGESTS = "sha256"


@main_only
def save_state(folder: str | PathLike[str], state: Any) -> None:
    """Write `state` to folder/state.safetensors, replacing the previous one in one step.

    Tensors are stored bit for bit, each in full: views come back contiguous, shared storage comes back separate.
    Where several processes compute a run together, all of them call this, and the main one writes.

    Args:
        folder: made if it does not exist.
        state: a tree as described above.

    Raises:
        InvalidInputError: the tree holds something else; the message says where. The previous state is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    try:
        tree = json.dumps(_encode(state, tensors, "state"), ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise InvalidInputError("state is nested too deeply to be written") from error
    folder = check_path("folder", folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / STATE_FILE, tensors, {HEADER: tree})


def load_state(folder: str | PathLike[str]) -> Any:
    """Read what `save_state` wrote; tensors on the CPU, each with memory of its own.

    Raises:
        InvalidInputError: there is no state, or the file is damaged, not a state, or without checksums.
    """
    path = check_path("folder", folder) / STATE_FILE
    if not path.is_file():
        raise InvalidInputError(
            f"no state to continue from: {path} does not exist; give a folder that save_state wrote"
        )
    tensors, header = load_tensors(path)
    if HEADER not in header or DIGESTS not in header:
        if WITHOUT_DIGESTS in header:
            raise InvalidInputError(f"{path} is from an earlier release, without checksums; only that can continue it")
        raise InvalidInputError(f"{path} is a safetensors file, but not a state; give a folder that save_state wrote")
    try:
        return _decode(json.loads(header[HEADER]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"{path} is damaged, or not a state: {error}") from error


def check_finite(state: Any, may_be_infinite: Collection[str] = ()) -> None:
    """Check every tensor and every number of a state.

    Args:
        state: as for `save_state`.
        may_be_infinite: keys whose tensors may hold infinity, such as a mask, or the logarithm of a weight of zero.

    Raises:
        NonFiniteError: a tensor or number is NaN, or a tensor holds infinity; the message says where.
    """
    for where, key, value in _leaves(state, "state", ""):
        if isinstance(value, float) and math.isnan(value):
            raise NonFiniteError(f"{where} is NaN")
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            allowed = ~value.isnan() if key in may_be_infinite else value.isfinite()
            if not allowed.all():
                raise NonFiniteError(f"{where} holds NaN or infinity")


def _leaves(value: Any, where: str, key: str) -> Iterator[tuple[str, str, Any]]:
    """Every leaf, with its path and the last key on it that is a string."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{where}[{name!r}]", name if isinstance(name, str) else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{where}[{index}]", key)
    else:
        yield where, key, value


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
        raise InvalidInputError(f"{path} is damaged, or not a state: {error}") from error
    return tensors, header


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_header(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """The tree of `value`; its tensors are added to `tensors` on the way."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _storable(value, where)
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise InvalidInputError(f"{where} has the key {key!r}; keys of a state are str or int")
        return {"dict": [[key, _encode(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, float):  # before the others: JSON has no NaN and no infinity
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if value is None or type(value) in (str, int, bool):
        return value
    raise InvalidInputError(
        f"{where} is a {type(value).__name__}; a state holds tensors, numbers, strings, booleans, None, "
        "and dicts, lists and tuples of them"
    )


def _storable(tensor: Tensor, where: str) -> Tensor:
    """A dense, contiguous copy on the CPU, with its own storage."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype == torch.complex128:
        raise InvalidInputError(
            f"{where} is a tensor of layout {tensor.layout} and dtype {tensor.dtype}, which cannot be stored; use a "
            "dense tensor of another dtype"
        )
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).resolve_conj().resolve_neg()


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("a bare list in the header")
        return tree
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _decode(item, tensors) for key, item in content}
        case "list":
            return [_decode(item, tensors) for item in content]
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "float":
            return float(content)
    raise ValueError(f"unknown entry {kind!r} in the header")
