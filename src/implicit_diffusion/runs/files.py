"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
