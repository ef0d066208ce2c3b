"""Images in arrays: IDX files, .npy, .npz and .safetensors, of shape (n, height, width), or with channels second.

    bytes, or integers in 0..255      grey levels as they are
    floats in [0, 1], or in [-1, 1]   levels from black to white; negative ones tell the two apart

Labels are those of the folder's IDX file, or of the archive's array that is called as that of the images is, with y in
place of x, or with labels in place of images: FILE.npz:x_train has its labels in y_train.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from implicit_diffusion.commands.pretrain.network import fitting_size
from implicit_diffusion.commands.shared.arrays.array_files import KEYED, place_of, read_array_file
from implicit_diffusion.commands.shared.arrays.idx import IdxFiles, idx_files, is_idx
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class ImageArray(Shown):
    """Images of one size.

    Args:
        images: uint8 in 0..255, or floats in [-1, 1].
        name: for reports and file names.
        left_out: files that are not among them.
        classes: their names, where they are asked for.
        labels: the number of every image's class.
    """

    images: Shaped[Tensor, "n channels height width"]
    name: str
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    labels: Int[Tensor, " n"] | None = None


def is_array(data: str) -> bool:
    """Whether the images are in an array."""
    if idx_files(data) is not None:
        return True
    path = Path(place_of(data)[0])
    return os.path.isfile(path) and (path.suffix.lower() in (".npy", *KEYED) or is_idx(path))


def load_array(data: str, size: tuple[int, int] | None, levels: int | None, *, classes: bool) -> ImageArray:
    """The images of an array; arguments as in `loading.load_images`.

    Raises:
        InvalidInputError: numbers that are not images; classes without labels, or with another number of them; floats
            whose size does not suit.
        MemoryLimitError: they do not fit into the memory that is free.
    """
    files = idx_files(data)
    array = read_array_file(data).array
    images = _brought_to(data, _images(data, array), size, levels)
    name = Path(place_of(data)[0]).name
    left_out = () if files is None else tuple(f"{other!r} (not training images)" for other in files.left_out)
    labelled = _labels_of(data, files)
    if not classes:
        if labelled is not None:
            print(f"classes   the labels in {labelled!r} are not used: --classes conditions the model on them")
        return ImageArray(images, name, left_out)
    if labelled is None:
        raise InvalidInputError(f"--classes: {data!r} has no labels; leave --classes out")
    labels = read_array_file(labelled).array
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise InvalidInputError(
            f"--classes: the labels in {labelled!r} must be {len(images)} whole numbers, one for each image, got "
            f"{labels.dtype} of shape {labels.shape}"
        )
    values, numbers = np.unique(labels, return_inverse=True)
    known = files.classes if files is not None and len(files.classes) > values.max() else None
    names = tuple(str(value) if known is None else known[value] for value in values.tolist())
    if len(names) < 2:
        raise InvalidInputError(f"--classes: all images of {data!r} have the label {names[0]}; leave --classes out")
    return ImageArray(images, name, left_out, names, torch.from_numpy(numbers.astype(np.int64)))


def _labels_of(data: str, files: IdxFiles | None) -> str | None:
    """Where the labels are, as `read_array_file` has it."""
    if files is not None:
        return None if files.labels is None else str(files.labels)
    file, key = place_of(data)
    if key is None:
        return None
    other = f"y{key[1:]}" if key.startswith("x") else key.replace("images", "labels")
    if other == key:
        return None
    try:
        read_array_file(f"{file}:{other}")
    except InvalidInputError:
        return None
    return f"{file}:{other}"


def _images(data: str, array: np.ndarray) -> Shaped[Tensor, "n channels height width"]:
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or array.shape[1] not in (1, 3) or not array.size:
        last = "; save array.transpose(0, 3, 1, 2)" if array.ndim == 4 and array.shape[3] in (1, 3) else ""
        raise InvalidInputError(
            f"data: {data!r} must have shape (n, height, width), or (n, channels, height, width) with 1 or 3 channels, "
            f"got {array.shape}{last}"
        )
    low, high = array.min(), array.max()
    if array.dtype.kind == "b":
        return torch.from_numpy(array.astype(np.uint8) * 255)
    if array.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise InvalidInputError(
                f"data: {data!r} holds whole numbers from {low} to {high}; grey levels are 0 to 255"
            )
        return torch.from_numpy(array.astype(np.uint8))
    if not (low >= -1 and high <= 1):  # NaN, too
        raise InvalidInputError(
            f"data: {data!r} holds numbers from {low:.3g} to {high:.3g}; floats must be in [0, 1] or in [-1, 1], or "
            "save array.astype('uint8') where they are grey levels"
        )
    images = torch.from_numpy(array.astype(np.float32))
    if low < 0:
        return images
    print("images    floats without a negative one are taken as levels in [0, 1]")
    return 2 * images - 1


def _brought_to(
    data: str, images: Shaped[Tensor, "n c h w"], size: tuple[int, int] | None, levels: int | None
) -> Shaped[Tensor, "n c height width"]:
    """Images of a size that the U-Net can halve, cut as those of a folder are."""
    own = (images.shape[2], images.shape[3])
    height, width = size or own
    target = fitting_size(height, width, levels)
    if target == own:
        return images
    if images.is_floating_point():
        raise InvalidInputError(
            f"data: {data!r} has images of {own[0]}×{own[1]} pixels, to be brought to {target[0]}×{target[1]}; that is "
            "done with grey levels of 0 to 255 (uint8) only"
        )
    require("PIL")
    from PIL import Image, ImageOps

    print(f"images of {own[0]}×{own[1]} pixels are brought to {target[0]}×{target[1]}")
    rows = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
    fitted = np.stack([np.asarray(ImageOps.fit(Image.fromarray(row), target[::-1])) for row in rows])
    return torch.from_numpy(fitted).reshape(len(images), *target, -1).permute(0, 3, 1, 2).contiguous()
