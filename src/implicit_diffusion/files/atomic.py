"""Files that are either the old one or the new one, never half of one, where files can be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from implicit_diffusion.errors import InvalidInputError, StorageError

UNFINISHED = ".tmp"  # ending of a file that is being written


def check_place(folder: Path) -> None:
    """Raise `InvalidInputError` unless `folder` is one that can be written to, or can be made with its parents."""
    try:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryDirectory(dir=there):  # permissions alone do not tell
            pass
    except OSError as error:
        raise InvalidInputError(f"`folder` {folder} cannot be made ({error}); name a folder elsewhere") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that is written in the block where the system refuses: a full disk, a vanished folder.

    Raises:
        StorageError: for every error of the system but our own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(
            f"{path} cannot be written ({reason}); make room there and see that the folder exists and may be written to"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` at the end of the block, in one step of the file system.

    Whatever ends the block or the process early leaves the previous `path` as it was. Contents and name have reached
    the disk when the block has ended.

    Raises:
        StorageError: what `writing` turns into one.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # the contents reach the disk before the name does
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # half a file would keep the disk full
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system lets folders be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
