"""States on disk: one safetensors file whose header holds the tree and whose body holds the tensors.

A state is what `state_dict()` returns: dicts (keys str or int), lists and tuples of tensors, numbers, strings,
booleans and None. In the header's JSON a tree reads

    tensor  {"tensor": "0"}              dict   {"dict": [[key, tree], ...]}     keys keep their type
    list    {"list": [tree, ...]}        tuple  {"tuple": [tree, ...]}
    float   1.5 or {"float": "nan"}      str, int, bool and None as themselves

so nothing in it can be executed. One file, renamed into place, can never be half of an old state and half of a new
one, however the process ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs.files import replacing

FILE = "state.safetensors"
HEADER = "implicit-diffusion state"


def save_state(folder: str | Path, state: Any) -> None:
    """Write `state` to folder/state.safetensors, replacing the previous one in one step.

    Tensors are stored bit for bit, each in full: views come back contiguous, shared storage comes back separate.

    Args:
        folder: made where it does not exist.
        state: a tree as described above.

    Raises:
        InvalidInputError: something in the tree that has no place in a state; the message names where. The previous
            state is untouched then.
    """
    tensors: dict[str, Tensor] = {}
    header = {HEADER: json.dumps(_encode(state, tensors, "state"), ensure_ascii=False, allow_nan=False)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_state(folder: str | Path) -> Any:
    """Read what `save_state` wrote; tensors on the CPU, each with memory of its own.

    Raises:
        InvalidInputError: no state there, or a damaged or foreign file.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InvalidInputError(f"no state to continue from: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise InvalidInputError(f"{path} is a safetensors file, but holds no state of ours")
            # safe_open maps the file; a copy outlives it and may be written to
            return _decode(json.loads(header), {name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{path} is damaged, or no state of ours: {error}") from error


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
    """A plain, contiguous CPU copy: the state as it is now, in a storage of its own."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype == torch.complex128:
        raise InvalidInputError(f"{where} is a tensor of layout {tensor.layout} and dtype {tensor.dtype}: not storable")
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
