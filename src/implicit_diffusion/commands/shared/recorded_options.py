"""The options of a run, read back from its config.json."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from implicit_diffusion import __version__
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory

C = TypeVar("C")


def read_options(kind: type[C], directory: RunDirectory) -> C:
    """The options that a run was begun with, as its command resolved them.

    Args:
        kind: the dataclass of the command's options.
        directory: of the run.

    Raises:
        InvalidInputError: config.json is gone or damaged, has an option that `kind` does not have, or lacks one.
        StorageError: it has vanished.
    """
    directory.check_there()
    values = directory.read_config()
    if values is None:
        raise InvalidInputError(
            f"{directory.path}/config.json is gone, or cannot be read; put the folder of the run back as it was"
        )
    types = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    if values.keys() != types.keys():
        unknown, missing = sorted(values.keys() - types.keys()), sorted(types.keys() - values.keys())
        wrong = [f"{word} {', '.join(names)}" for word, names in (("has", unknown), ("lacks", missing)) if names]
        origin = directory.read_origin()
        raise InvalidInputError(
            f"{directory.path}/config.json {' and '.join(wrong)}: these are not the options of "
            f"{f'`{origin.command}`' if origin else 'this command'} in version {__version__}, which cannot use this run"
        )
    read: dict[str, Any] = {}
    for name, value in values.items():
        if "Path" in types[name] and value is not None:
            read[name] = Path(value)
        else:
            read[name] = tuple(value) if isinstance(value, list) else value
    return kind(**read)
