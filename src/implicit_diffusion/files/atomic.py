"""Atomic writing: a file is the old one or the new one, never half of either; and checks of where to write."""

from __future__ import annotations

import errno
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
        with tempfile.TemporaryDirectory(dir=there):  # permissions alone do not decide it
            pass
    except OSError as error:
        raise InvalidInputError(f"`folder` {folder} cannot be made ({error}); name a folder elsewhere") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that the block writes where the system refuses: a full disk, a missing folder.

    Raises:
        StorageError: for every error of the operating system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(
            f"{path} cannot be written ({reason}); make room there, and check that the folder exists and is writable"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` at the end of the block, in one step of the file system.

    If the block or the process ends early, the previous `path` stays unchanged. At the end of the block, contents and
    name are on the disk.

    Raises:
        StorageError: as in `writing`.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    with writing(path):
        try:
            yield temporary
            sync(temporary)  # the contents reach the disk before the name does
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # half a file would keep the disk full
                temporary.unlink()
            raise
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder with its parents; their names are then on the disk.

    Raises:
        StorageError: as in `writing`.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync_folder(made.parent)


def sync(file: Path) -> None:
    """Write the contents of a file to the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can open folders and sync them."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the answer of Windows for every folder
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
