"""A lock on a folder. It is the operating system's, and ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.files.foreign import check_folder

LOCK = ".lock"  # exists while a process holds the folder


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder during the block; it is made if it does not exist. No other process or thread can hold it
    meanwhile.

    A thread that holds the folder may hold it again. A folder that was made here, and is empty after the block, is
    removed.

    Raises:
        InvalidInputError: another run holds the folder, it cannot be made, something in it leads out of it, or this
            is one of several processes.
        StorageError: the file system has no locks.
    """
    from filelock import FileLock, Timeout

    _check_alone()
    path = folder.absolute()  # the block may change the working directory
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"`folder` {str(path)!a} is not UTF-8; name another folder") from error
    check_folder(path)
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
            with suppress(OSError):  # not empty, or removed
                (path / LOCK).unlink()  # before it is released: nobody else can hold it yet
                for empty in made:
                    empty.rmdir()
        lock.release()


def make(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that did not exist, the deepest first.

    Raises:
        InvalidInputError: the folder or one of its parents is a file, or the file system refuses.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InvalidInputError(f"`folder` {folder} is a file; name a new folder") from error
    except OSError as error:  # for example a name that the file system does not allow
        raise InvalidInputError(f"`folder` {folder} cannot be made ({error}); name a folder elsewhere") from error
    return missing


def _check_alone() -> None:
    """Raise `InvalidInputError` under a launcher of several processes, which would all train the same."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise InvalidInputError(
            f"this is one of {count} processes (WORLD_SIZE, as torchrun sets it), which would all train the same: a "
            "run uses one process; start it without the launcher"
        )
