"""Fingerprints of inputs: the sha256 of files, folders and tensors, as values for JSON.

{"files": {path: sha256, ...}}                            single files
{"folder": path, "endings": [...], "files": {...}}        all files below a folder, by their relative paths
{"tensor": sha256}                                        numbers from any source
{"version": words}                                        a program
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.processes import whole

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # endings of what is loaded of a model's folder
Input = Path | Sequence[Path] | Tensor | Mapping[str, Any]


def fingerprint(source: Input, endings: Collection[str] = ()) -> dict[str, Any]:
    """The sha256 of an input, for `record`. Compute it before the input is read, so that a later change shows.

    Args:
        source: a file, several files, a folder with all files below it, or a tensor; one that is shared out over
            processes is gathered.
        endings: of the names in a folder that count; empty for all files that are not hidden.

    Raises:
        InvalidInputError: a file cannot be read.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, Tensor):
        content = whole(source.detach()).cpu().contiguous()
        digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
        return {"tensor": digest.hexdigest()}
    if isinstance(source, Path) and source.is_dir():
        listed = _listing(source, endings)
        return {"folder": str(source.absolute()), "endings": sorted(endings), "files": _hashes(source, listed)}
    files = [source] if isinstance(source, Path) else source
    return {"files": _hashes(Path(), [str(file.absolute()) for file in files])}


def is_fingerprint(entry: object) -> bool:
    """Whether `entry`, read from a file, can be what `fingerprint` returned."""
    if not isinstance(entry, dict) or not entry.keys() <= {"files", "folder", "endings", "tensor", "version"}:
        return False
    files, endings = entry.get("files"), entry.get("endings", [])
    named = isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values())
    placed = isinstance(entry.get("folder", ""), str) and isinstance(endings, list)
    return (named and placed) or isinstance(entry.get("tensor", entry.get("version")), str)


def fingerprint_now(entry: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The fingerprint of the same files or folder now, without those that no longer exist."""
    if "folder" in entry:
        folder = base / entry["folder"]
        listed = _listing(folder, entry["endings"]) if folder.is_dir() else []
        return dict(entry) | {"files": _hashes(folder, listed)}
    there = [file for file in entry["files"] if (base / file).is_file()]
    return dict(entry) | {"files": _hashes(base, there)}


def relative(entry: dict[str, Any], base: Path) -> dict[str, Any]:
    """The fingerprint with paths below `base` relative to it."""

    def moved(path: str) -> str:
        inside = Path(path).is_relative_to(base.absolute())
        return Path(path).relative_to(base.absolute()).as_posix() if inside else path

    if "folder" in entry:
        return entry | {"folder": moved(entry["folder"])}
    if "files" in entry:
        return {"files": {moved(file): digest for file, digest in entry["files"].items()}}
    return entry


def _listing(folder: Path, endings: Collection[str]) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and (not endings or path.suffix in endings))
    names = (file.relative_to(folder) for file in files)
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _hashes(base: Path, files: Sequence[str]) -> dict[str, str]:
    hashes = {}
    for file in files:
        try:
            with (base / file).open("rb") as content:
                hashes[file] = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise InvalidInputError(f"{base / file} cannot be read: {error}") from error
    return hashes


def short_digest(digest: str | None) -> str:
    """A digest, shortened for a message."""
    return "not there" if digest is None else f"sha256 {digest[:12]}…"
