"""Files that are either the old one or the new one, never half of one, where files can be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from implicit_diffusion.errors import InvalidInputError


def check_place(folder: Path) -> None:
    """Raise `InvalidInputError` unless `folder` is one that can be written to, or can be made with its parents."""
    try:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryDirectory(dir=there):  # permissions alone do not tell
            pass
    except OSError as error:
        raise InvalidInputError(f"--out: {folder} cannot be made ({error}); name a folder elsewhere") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` at the end of the block, in one step of the file system.

    Whatever ends the block or the process early leaves the previous `path` as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # the contents reach the disk before the name does
    temporary.replace(path)
