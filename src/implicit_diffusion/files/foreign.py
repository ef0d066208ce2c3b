"""Folders from elsewhere: what is read from them, or written to them, lies inside.

A link in a folder that was unpacked may lead to any file of the user. Reading it would copy that file into a result,
and writing to it would replace it. So a link may lead to places within the folder only, and a file of a run may have no
second name outside. A program that changes the folder while it is read is beyond these checks.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError
from implicit_diffusion.files.reading import one_line, refuse_unless_regular

LOG_OF_WANDB = "wandb/*/logs/debug-core.log"  # a link to its own cache; each start of it logs into another folder


def inside(folder: Path, path: Path, *, linked: bool = False) -> Path:
    """The path of a regular file in a model's folder, with links followed.

    Args:
        folder: of the model.
        path: below it.
        linked: whether the file may be a link to any place; otherwise only to places within the folder, and from the
            hub's cache to its blobs.

    Raises:
        InvalidInputError: it is outside of the folder (unless `linked`), does not exist, or is not a regular file.
    """
    try:
        home, target = folder.resolve(strict=True), path.resolve(strict=True)
        refuse_unless_regular(path, target.stat().st_mode)
    except InvalidInputError:
        raise
    except (OSError, RuntimeError) as error:  # a RuntimeError for links in a circle
        raise InvalidInputError(f"{path} cannot be read ({one_line(error)})") from error
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not linked and not any(target.is_relative_to(place) for place in homes):
        raise InvalidInputError(
            f"{path} is a link to {target}, outside of the model's folder, and files from elsewhere are not read; if "
            "it belongs to the model, copy it there"
        )
    return target


def inconsistent(error: Exception) -> str:
    """What is said of a folder whose contents do not fit each other."""
    return f"cannot be used: what is in it does not fit together ({type(error).__name__}: {one_line(error)})"


def of_another(error: Exception) -> str:
    """What is said of a state that does not fit the run that would continue from it."""
    return f"does not fit this run: {one_line(error)}"


@contextmanager
def consistent(folder: Path, says: Callable[[Exception], str] = inconsistent) -> Iterator[None]:
    """Turn errors about contents that are sound by themselves, but do not fit, into one that names their folder.

    Args:
        folder: that the block works on the contents of.
        says: what to say of it.

    Raises:
        InvalidInputError: for the errors that Python raises about a wrong type, key, attribute or number.
    """
    try:
        yield
    except ImplicitDiffusionError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "out of memory" in str(error):
            raise
        raise InvalidInputError(f"{folder} {says(error)}") from error


def check_folder(folder: Path) -> None:
    """Check everything below a folder that is going to be written to; nothing in it is opened.

    Raises:
        InvalidInputError: a link that leads out of it, a file with a second name outside (a hard link), a pipe, a
            device or a socket, or a folder that cannot be read.
    """
    if not os.path.isdir(folder):
        return
    home = Path(os.path.realpath(folder))
    names: dict[tuple[int, int], list[Path]] = defaultdict(list)  # of each file with several
    links: dict[tuple[int, int], int] = {}

    def unreadable(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # removed by the process that holds the folder
            return
        raise InvalidInputError(f"{error.filename} cannot be read ({error.strerror})") from error

    for place, folders, files in os.walk(folder, onerror=unreadable):
        for path in (Path(place, name) for name in (*folders, *files)):
            try:
                status = path.lstat()
            except FileNotFoundError:  # a temporary file of the process that holds the folder
                continue
            if stat.S_ISLNK(status.st_mode):
                if path.relative_to(folder).match(LOG_OF_WANDB):
                    continue
                target = Path(os.path.realpath(path))
                if not target.is_relative_to(home):
                    raise InvalidInputError(
                        f"{path} is a link to {target}, outside of the folder {folder}, where nothing is read or "
                        "written; if it belongs there, replace the link by what it leads to"
                    )
            elif not stat.S_ISDIR(status.st_mode):
                refuse_unless_regular(path, status.st_mode)
                if status.st_nlink > 1:
                    file = (status.st_dev, status.st_ino)
                    names[file].append(path)
                    links[file] = status.st_nlink
    for file, paths in names.items():
        if len(paths) < links[file]:
            raise InvalidInputError(
                f"{paths[0]} has a second name outside of the folder {folder} (a hard link), and writing would change "
                "both; use a copy of the folder"
            )
