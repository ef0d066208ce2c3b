"""One holder of a folder at a time, by a lock of the operating system that ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import writing

LOCK = ".lock"  # there while a process holds the folder


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder for the block, which makes it: no other process, nor thread, can meanwhile.

    A thread that holds the folder may hold it once more. Where the block leaves nothing in a folder that was made for
    it, it is taken away.

    Raises:
        InvalidInputError: another run holds the folder; one that cannot be made; several processes of one program.
        StorageError: a file system without locks.
    """
    from filelock import FileLock, Timeout

    _check_alone()
    path = folder.absolute()  # wherever the block changes to
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"`folder` {str(path)!a} is not UTF-8; name another folder") from error
    made = make(path)
    lock = FileLock(path / LOCK, blocking=False, is_singleton=True)
    with writing(path / LOCK):
        try:
            lock.acquire()
        except Timeout as error:
            raise InvalidInputError(
                f"`folder` {folder} is in use by another run; wait until that has ended, or choose another folder"
            ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # not empty, or gone
                (path / LOCK).unlink()  # before it is released: nobody else can hold it yet
                for empty in made:
                    empty.rmdir()
        lock.release()


def make(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were not there, the deepest first.

    Raises:
        InvalidInputError: a file is there, or in the way, or the file system refuses.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InvalidInputError(f"`folder` {folder} is a file; name a new folder") from error
    except OSError as error:  # a name that the file system does not take
        raise InvalidInputError(f"`folder` {folder} cannot be made ({error}); name a folder elsewhere") from error
    return missing


def _check_alone() -> None:
    """Raise `InvalidInputError` under a launcher of several processes, which would all train the same."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise InvalidInputError(
            f"this is one of {count} processes (WORLD_SIZE, as torchrun sets it), which would all train the same: a "
            "run uses one process so far; start it without the launcher"
        )
