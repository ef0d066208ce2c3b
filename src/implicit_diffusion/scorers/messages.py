"""Messages between a run and a scorer: a line of JSON, and the bytes of a safetensors file behind it.

    {"call": {"list": [{"tensor": "0"}, {"list": ["a boat", "a house"]}]}, "seed": [7, …], "bytes": 4160}
    4160 bytes: "0" is float32 with shape (2, 1, 8, 64)

What rewards are called with and what they return crosses as it is: words, numbers, lists, tuples and dicts of them in
the line; tensors, arrays and PIL images in the file. Anything else crosses as the name of its type, for messages.

Both sides use this module, and the python of a scorer may have neither this package nor torch: it imports NumPy and
safetensors alone, and runs with Python 3.8.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Arrays = dict  # of name to np.ndarray: what the file holds


def frame(head: dict[str, Any], arrays: Arrays) -> bytes:
    """A message as bytes."""
    file = save(arrays) if arrays else b""
    return json.dumps({**head, "bytes": len(file)}).encode() + b"\n" + file


def unframed(line: bytes, file: bytes) -> tuple[dict[str, Any], Arrays]:
    """The message that `frame` has made; arrays may be written to."""
    arrays = load(file) if file else {}
    return json.loads(line), {name: x if x.flags.writeable else x.copy() for name, x in arrays.items()}


def size_of(line: bytes) -> int:
    """The number of bytes behind a line."""
    return int(json.loads(line)["bytes"])


def read(stream: io.BufferedIOBase) -> tuple[dict[str, Any], Arrays] | None:
    """The next message of a stream, or None at its end."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    size = size_of(line)
    file = stream.read(size)
    return unframed(line, file) if len(file) == size else None


def pack(value: Any, arrays: Arrays) -> Any:
    """A value for the line; its numbers, where they are many, go into `arrays`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [pack(each, arrays) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key, arrays), pack(each, arrays)] for key, each in value.items()]}
    if _is_a(value, "torch", "Tensor"):
        tensor = value.detach().cpu().contiguous()
        dtype = str(tensor.dtype).partition(".")[2]
        return {"tensor": _store(_bits(tensor).numpy(), arrays), "dtype": dtype}
    if _is_a(value, "PIL.Image", "Image"):
        return {"picture": _store(np.asarray(value), arrays)}
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind in "fiub":
            return {"array": _store(value, arrays)}
        return pack(value.tolist(), arrays)  # words, or objects
    return {"other": type(value).__name__, "callable": callable(value)}


def unpack(value: Any, arrays: Arrays) -> Any:
    """The value that `pack` has packed.

    Raises:
        ModuleNotFoundError: torch or PIL is not installed here, and the value holds a tensor or a picture.
    """
    if not isinstance(value, dict):
        return value
    if "list" in value:
        return [unpack(each, arrays) for each in value["list"]]
    if "tuple" in value:
        return tuple(unpack(each, arrays) for each in value["tuple"])
    if "dict" in value:
        return {unpack(key, arrays): unpack(each, arrays) for key, each in value["dict"]}
    if "array" in value:
        return arrays[value["array"]]
    if "tensor" in value:
        import torch

        tensor, dtype = torch.from_numpy(arrays[value["tensor"]]), getattr(torch, value["dtype"])
        return tensor if tensor.dtype == dtype else tensor.view(dtype)
    if "picture" in value:
        from PIL import Image

        return Image.fromarray(arrays[value["picture"]])
    call = {"__call__": lambda self: None} if value["callable"] else {}
    return type(value["other"], (), call)()


def _store(array: Any, arrays: Arrays) -> str:
    name = str(len(arrays))
    arrays[name] = np.asarray(array, order="C")
    return name


def _is_a(value: Any, module: str, kind: str) -> bool:
    """Whether a value is of a class of a module, which need not be installed here."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], kind))


def _bits(tensor: Any) -> Any:
    """The tensor, or, where NumPy has no such dtype (bfloat16), its bits as integers."""
    import torch

    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        return tensor.view({1: torch.uint8, 2: torch.int16}[tensor.element_size()])
    return tensor
