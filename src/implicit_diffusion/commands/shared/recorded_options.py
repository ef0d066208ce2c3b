"""The options of a run, read back from its config.json."""

from __future__ import annotations

from typing import Any, TypeVar, get_type_hints

from implicit_diffusion import __version__
from implicit_diffusion.commands.shared.summaries import from_json
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory

C = TypeVar("C")


def read_options(kind: type[C], directory: RunDirectory) -> C:
    """The options that a run was begun with, as its command resolved them.

    Args:
        kind: the dataclass of the command's options.
        directory: of the run.

    Raises:
        InvalidInputError: config.json is gone or damaged, has an option that `kind` does not have, or lacks one,
            or has one of another type.
    """
    values = directory.read_config()
    if values is None:
        raise InvalidInputError(
            f"{directory.path}/config.json is gone, or cannot be read; put the folder of the run back as it was"
        )
    types = get_type_hints(kind)
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
        try:
            read[name] = from_json(types[name], value)
        except TypeError as error:
            raise InvalidInputError(f"{directory.path}/config.json cannot be used: {name}: {error}") from error
    return kind(**read)
