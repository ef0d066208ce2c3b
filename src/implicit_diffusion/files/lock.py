"""A lock on a folder. It is the operating system's, and ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.files.foreign import check_folder
from implicit_diffusion.processes import from_main, main_alone, world_size

LOCK = ".lock"  # exists while a process holds the folder


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder during the block; it is made if it does not exist. No other program or thread can hold it
    meanwhile. Where several processes compute a run together, the main one holds it for all.

    A thread that holds the folder may hold it again. A folder that was made here, and is empty after the block, is
    removed.

    Raises:
        InvalidInputError: another run holds the folder, it cannot be made, something in it leads out of it, or this is
            one of several processes that nothing connects.
        StorageError: the file system has no locks.
    """
    _check_alone()
    held = ExitStack()
    from_main(lambda: held.enter_context(_hold(folder)))
    try:
        yield
    finally:
        main_alone(held.close)


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """The same in this process."""
    from filelock import FileLock, Timeout

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
    """Raise `InvalidInputError` in one of several processes that nothing connects, which would all train the same."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1 and world_size() == 1:
        raise InvalidInputError(
            f"this is one of {count} processes (WORLD_SIZE, as torchrun sets it), which know nothing of each other and "
            "would all train the same: call torch.distributed.init_process_group() first, or start one process"
        )
