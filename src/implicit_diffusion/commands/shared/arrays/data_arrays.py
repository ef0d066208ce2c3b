"""Arrays of data in files as tensors: vectors with shape (m, d), or images with shape (m, channels, height, width)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.shared.arrays.array_files import MOST_LISTED, read_array_file
from implicit_diffusion.errors import InvalidInputError


def read_array(name: str) -> Float[Tensor, "m *event"]:
    """An array of data from a file, in double precision where single would round it."""
    return to_tensor(name, read_array_file(name).array)


def to_tensor(name: str, array: np.ndarray) -> Float[Tensor, "m *event"]:
    """An array of data, in double precision where single would round it."""
    if array.ndim not in (2, 4):
        raise InvalidInputError(
            f"--data {name} must have shape (m, d) or (m, channels, height, width), got {array.shape}"
        )
    if array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        raise InvalidInputError(
            f"--data {name} has shape {array.shape}, which looks like (m, height, width, channels); channels come "
            "second: save array.transpose(0, 3, 1, 2)"
        )
    if array.size == 0:
        raise InvalidInputError(f"--data {name} holds no data, got shape {array.shape}")
    single = np.can_cast(array.dtype, np.float32)
    x = torch.from_numpy(array.astype(np.float32 if single else np.float64, order="C"))
    if array.dtype.kind in "iu" and not single and (x.abs() > 2**53).any():
        raise InvalidInputError(
            f"--data {name} holds integers beyond 2^53, which are rounded; subtract an offset first"
        )
    bad = (~(x.flatten(1).abs() <= torch.finfo(torch.float32).max).all(1)).nonzero().flatten().tolist()  # NaN, too
    if bad:
        rows = ", ".join(map(str, bad[:MOST_LISTED])) + (", …" if len(bad) > MOST_LISTED else "")
        raise InvalidInputError(
            f"--data {name}: {len(bad)} of {len(x)} rows hold NaN or infinity; remove or impute them (rows {rows})"
        )
    return x
