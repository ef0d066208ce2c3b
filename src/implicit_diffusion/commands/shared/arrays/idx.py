"""IDX files, in which MNIST and its kin are published: bytes 0, 0, type, number of dimensions, sizes, then the numbers.

    train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-…, t10k-labels-…         plain or gzipped

All numbers are big-endian. No library that this package needs reads them.
"""

from __future__ import annotations

import gzip
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from implicit_diffusion.errors import InvalidInputError, MemoryLimitError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
NAME = re.compile(r"(?:.*[-.])?idx\d?(-ubyte)?(\.gz)?|.*-ubyte(\.gz)?", re.IGNORECASE)
FASHION = "fashion-mnist"
PACKAGES = {FASHION: Path("/usr/share/datasets/fashion-mnist")}  # of Debian: the package dataset-fashion-mnist
CLASSES = {
    FASHION: (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )
}  # fmt: skip


@dataclass(frozen=True)
class IdxFiles:
    """The training images of a folder of IDX files, and their labels.

    Args:
        images: the file.
        labels: the file; None where there is none.
        left_out: names of the other IDX files.
        classes: names of the labels, where they are known.
    """

    images: Path
    labels: Path | None
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def is_idx(path: Path) -> bool:
    """Whether a file is called like an IDX file."""
    return NAME.fullmatch(path.name) is not None


def idx_files(name: str) -> IdxFiles | None:
    """The IDX files of a folder, or of a data set that is known by name; None for anything else.

    Raises:
        InvalidInputError: a known name whose package is not installed.
    """
    folder = PACKAGES.get(name, Path(name))
    if name in PACKAGES and not folder.is_dir():
        raise InvalidInputError(
            f"--data {name}: {folder} is missing; `sudo apt install dataset-{name}` on Debian or Ubuntu puts the "
            "images there. Elsewhere give a folder with the four IDX files"
        )
    if not name or not os.path.isdir(folder):
        return None
    files = sorted(file for file in folder.iterdir() if is_idx(file) and file.is_file())
    images = [file for file in files if file.name.startswith("train-images")]
    if not images:
        return None
    if len(images) > 1:
        raise InvalidInputError(
            f"--data {name}: several files of training images, {', '.join(file.name for file in images)}; keep one"
        )
    labels = next((file for file in files if file.name.startswith("train-labels")), None)
    others = tuple(file.name for file in files if file not in (images[0], labels))
    return IdxFiles(images[0], labels, others, CLASSES.get(name, ()))


def read_idx(name: str, path: Path) -> np.ndarray:
    """The numbers of an IDX file, in the order of bytes of this machine.

    Args:
        name: for messages.
        path: of the file, plain or gzipped.

    Raises:
        ValueError: not an IDX file, or one that promises more or fewer numbers than it holds.
    """
    with path.open("rb") as probe:
        zipped = probe.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if zipped else path.open("rb") as file:
        shape, dtype = _header(file)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        _check_memory(name, size)
        content, rest = file.read(size), file.read(1)
    if rest or len(content) < size:
        held = "more" if rest else len(content)
        raise ValueError(f"its header says {size} bytes of shape {shape}, and {held} follow")
    array = np.frombuffer(content, dtype).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))


def _header(file: Any) -> tuple[tuple[int, ...], str]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or not magic[3]:
        raise ValueError(f"it begins with {magic.hex(' ') or 'nothing'}, not with the four bytes of an IDX file")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise ValueError("it ends within its header")
    return tuple(int(size) for size in np.frombuffer(sizes, ">u4")), TYPES[magic[2]]


def _check_memory(name: str, needed: int) -> None:
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(f"--data {name} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
