"""Manifests: what the file of a state holds, to the last bit; written after it, and read before it.

    manifest.json   schema    version of this description and of the file
                    library   version of this package that wrote them
                    about     what the state is of: its run, its update
                    file      size of the safetensors file in bytes, the SHA-256 of its header
                    tensors   by their place in the state: dtype, shape, the SHA-256 of their bytes
                    sha256    of all of the above

The header of a safetensors file is all that precedes the tensors, and these fill the rest without a gap; the manifest
is accepted in the one form only in which it is written. So a bit that flips anywhere is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from implicit_diffusion import __version__
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.files.reading import one_line, parse_json, read_bytes

MANIFEST = "manifest.json"
SCHEMA = 1
LENGTH = 8  # bytes that hold the length of the rest of a safetensors header
LONGEST_HEADER = 100_000_000  # bytes, the most that safetensors reads
# what readers raise of a damaged file, whose sizes may overflow, or exceed the memory
OF_READERS = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError)


class OtherSchemaError(InvalidInputError):
    """A state that another version of this package wrote: it is whole, but cannot be read here."""


@dataclass(frozen=True)
class Manifest:
    """What the file of a state holds.

    Args:
        about: what the state is of, by names; plain values.
        file: {"size": …, "header": sha256}.
        tensors: by name {"dtype": …, "shape": …, "sha256": …}.
        library: version that wrote it.
        schema: of the description.
    """

    about: dict[str, Any]
    file: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    library: str = field(default=__version__)
    schema: int = SCHEMA

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Manifest:
        """The manifest of a file that has been written, from what was to be in it; the file itself is not checked."""
        size, header = _header(path)
        return cls(
            dict(about),
            {"size": size, "header": header},
            {name: _described(tensor) for name, tensor in tensors.items()},
        )

    def write(self, folder: Path) -> None:
        """Replace manifest.json in one step; from then on, the state in the folder is this one."""
        with replacing(folder / MANIFEST) as file:
            file.write_bytes(_written(asdict(self)))

    def fits(self, path: Path) -> bool:
        """Whether a file is there, and is what was written."""
        try:
            self.check(path)
        except InvalidInputError:
            return False
        return True

    def check(self, path: Path) -> dict[str, str]:
        """The metadata of the file, of which every byte is compared with what was written.

        It reads the bytes by itself: `safe_open` keeps two numbers for ever with each tensor that it reads, which adds
        up over the checkpoints of a long run.

        Raises:
            InvalidInputError: a bit of it is not as it was written; the message says what is damaged.
        """
        with _naming_damage(path):
            size, header = _header(path)
            if size != self.file["size"]:
                raise ValueError(f"it has {size} bytes, and was written with {self.file['size']}")
            if header != self.file["header"]:  # dtypes and shapes are in it
                raise ValueError("its header is not what was written")
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as contents:
                start = LENGTH + int.from_bytes(contents[:LENGTH], "little")
                entries = json.loads(contents[LENGTH:start])
                metadata: dict[str, str] = entries.pop("__metadata__", {})
                for name in sorted({*entries, *self.tensors}):
                    first, last = entries[name]["data_offsets"]
                    with memoryview(contents) as view, view[start + first : start + last] as part:
                        sha256 = hashlib.sha256(part).hexdigest()
                    if sha256 != self.tensors.get(name, {}).get("sha256"):
                        raise ValueError(f"tensor {name} is not what was written: its checksum differs")
        return metadata

    def load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, on the CPU and each with memory of its own, and metadata of the file.

        Raises:
            InvalidInputError: as `check`.
        """
        metadata = self.check(path)
        with _naming_damage(path), safe_open(path, framework="pt") as file:
            # safe_open maps the file; a copy outlives it and may be written to
            return {name: file.get_tensor(name).clone() for name in self.tensors}, metadata


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes readers raise into one error of ours."""
    try:
        yield
    except InvalidInputError:
        raise
    except OF_READERS as error:
        raise InvalidInputError(f"{path} is damaged: {one_line(error)}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder.

    Raises:
        InvalidInputError: there is none, or it is damaged.
        OtherSchemaError: it is whole, but of another schema; the message names both, and the version that wrote it.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist, which is written last: the state is not complete")
    contents = read_bytes(path)
    values = parse_json(path, contents)
    if _written({name: value for name, value in values.items() if name != "sha256"}) != contents:
        raise InvalidInputError(f"{path} is damaged: it is not what was written, by its own checksum")
    if values.get("schema") != SCHEMA:
        raise OtherSchemaError(
            f"{folder} has schema {values.get('schema')}, of version {values.get('library')} of this package; "
            f"{__version__} reads schema {SCHEMA}: continue with the version that wrote it"
        )
    try:
        manifest = Manifest(**{name: value for name, value in values.items() if name != "sha256"})
        kinds = {"about": dict, "file": dict, "tensors": dict, "library": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(getattr(manifest, name), kind)]
        if wrong or manifest.file.keys() != {"size", "header"}:
            raise TypeError(f"{', '.join(wrong) or 'file'} cannot be what was written")
    except TypeError as error:
        raise InvalidInputError(f"{path} is not a manifest: {error}") from error
    return manifest


def digest(tensor: Tensor) -> str:
    """The SHA-256 of the bytes of a contiguous tensor on the CPU."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _described(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "sha256": digest(tensor)}


def _header(path: Path) -> tuple[int, str]:
    """Size of a safetensors file, and the SHA-256 of its header."""
    with path.open("rb") as file:
        length = file.read(LENGTH)
        rest = min(int.from_bytes(length, "little"), LONGEST_HEADER)
        header = hashlib.sha256(length + file.read(rest))
        return file.seek(0, 2), header.hexdigest()


def _written(values: Mapping[str, Any]) -> bytes:
    """The one form of a manifest: its values, and their checksum."""
    sha256 = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**values, "sha256": sha256}, indent=1, sort_keys=True) + "\n").encode()
