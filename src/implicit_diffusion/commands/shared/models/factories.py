"""Models of the user's own, by name: FILE.py:factory, or a folder that such a model was saved in.

A factory is a function that returns a `DiffusionModel`. In the name it may have literal arguments, "FILE.py:flow(4)".
It is code, and runs as rewards do (`rewards.trust`): where the user names it, or where a folder names what this user
has named before, unchanged and outside of that folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.rewards.arguments import read_arguments
from implicit_diffusion.commands.rewards.names import blamed, function_of, paths_kept
from implicit_diffusion.commands.rewards.trust import Code, allow, check_trust, code_of, spelled
from implicit_diffusion.errors import InvalidInputError, MissingExtraError, shown
from implicit_diffusion.models.own_models.diffusion_model import DiffusionModel
from implicit_diffusion.models.own_models.files import is_own_model, load_own_weights, read_factory
from implicit_diffusion.models.own_models.opened import OwnModel, opened
from implicit_diffusion.processes import main_only

RETURNS = "return DiffusionModel(denoiser, schedule, event_shape)"


def is_factory(name: object) -> bool:
    """Whether the name of a model is FILE.py:factory."""
    return isinstance(name, str) and spelled(name).place.endswith(".py")


def factory_of(name: object) -> str | None:
    """The factory of a model: FILE.py:factory itself, or what a folder names; None for any other model.

    Raises:
        InvalidInputError: the folder's factory.json is damaged, or names no FILE.py:factory.
    """
    if is_factory(name):
        return str(name)
    folder = _folder(name)
    if folder is None:
        return None
    named = read_factory(folder)
    if not is_factory(named):
        raise InvalidInputError(f"`model` {folder}: its factory.json must name a FILE.py:factory, got {named!r}")
    return named


def code_of_model(name: object) -> Code | None:
    """The code that makes a model, read and not run; None for a model without code of somebody's own.

    Raises:
        InvalidInputError: there is no such file, or it cannot be read.
    """
    factory = factory_of(name)
    if factory is None:
        return None
    with of_models():
        try:
            return code_of(factory)
        except OSError as error:
            raise InvalidInputError(f"`model` {factory} cannot be read: {error}") from error
        except InvalidInputError as error:
            if is_factory(name):
                raise
            where = f"{name}/factory.json names it; put it back, or write its new place there"
            raise InvalidInputError(f"{error}; {where}") from error


def models_in(options: Any) -> dict[str, str]:
    """The names of the models among the options of a command, or of a stage of it, by the name of the option."""
    source = getattr(options, "network", options)
    named = {name: getattr(source, name, None) for name in ("model", "reference")}
    return {name: value for name, value in named.items() if isinstance(value, str)}


def with_code(options: Any) -> tuple[str, ...]:
    """The options that name a model with code of somebody's own."""
    return tuple(name for name, value in models_in(options).items() if factory_of(value) is not None)


def check_models(options: Any, directory: Path, *, trusted: bool) -> None:
    """Refuse models that a directory names whose code is not to be trusted; nothing of it has run then.

    Args:
        options: that the directory holds.
        directory: of the run, or of the model.
        trusted: whether the user allows this code in any case; it counts as named from then on.

    Raises:
        InvalidInputError: see `rewards.trust.check_trust`.
    """
    if trusted:
        for name in models_in(options).values():
            if (code := code_of_model(name)) is not None:
                allow(code)
    else:
        _refuse_strangers(options, directory)


@main_only
def _refuse_strangers(options: Any, directory: Path) -> None:
    for name in models_in(options).values():
        if (factory := factory_of(name)) is not None:
            check_trust(factory, directory, what="model")
            _check_folder(name)


def _check_folder(name: str) -> None:
    """Refuse the code that a model's own folder names, where it is not to be trusted."""
    folder = _folder(name)
    if folder is None or is_factory(name):
        return
    run = folder.parent if (folder.parent / "config.json").is_file() else folder
    once = f"`implicit-diffusion sample --model {folder} --trust-model` does"
    check_trust(read_factory(folder), run, what="model", advice=f"allow it once, as {once}")


def open_own_model(name: str) -> OwnModel | None:
    """The model that a factory makes, with the weights of its folder where the name is one; None for other names.

    Raises:
        InvalidInputError: code that is not to be trusted; no such file or function; whatever it raises; a result that
            is not a `DiffusionModel`, or that does not fit the weights of the folder.
    """
    factory = factory_of(name)
    if factory is None:
        return None
    _check_folder(name)
    model = _made(factory)
    folder = None if is_factory(name) else _folder(name)
    if folder is not None:
        try:
            load_own_weights(folder, model.denoiser)
        except InvalidInputError as error:
            raise InvalidInputError(f"`model` {error}") from error
    return opened(model, name, folder)


def _made(name: str) -> DiffusionModel:
    """What the factory returns."""
    place, function, call = spelled(name)
    with of_models():
        if "(" in function:
            raise InvalidInputError(f"`model` {name}: the arguments end without a ), as in FILE.py:factory(width=2)")
        positional, named = read_arguments(name, call) if call else ((), {})
        with paths_kept():
            factory = function_of(name)
            try:
                inspect.signature(factory).bind(*positional, **named)
            except TypeError as error:
                raise InvalidInputError(
                    f"`model` {name}: {function} cannot be called with these arguments ({error}); a factory is called "
                    f"with those in its name alone, as in {Path(place).name}:{function}(width=2)"
                ) from error
            except ValueError:  # functions written in C may have no signature
                pass
            try:
                with blamed(name):
                    model = factory(*positional, **named)
            except MissingExtraError:
                raise
            except InvalidInputError as error:  # of ours, from inside
                message = str(error)
                raise InvalidInputError(message if "`reward`" in message else f"`model` {name}: {message}") from error
    if not isinstance(model, DiffusionModel):
        raise InvalidInputError(f"`model` {name} must {RETURNS}, got {shown(model)}")
    return model


@contextmanager
def of_models() -> Iterator[None]:
    """Let the errors of the block, which were written for rewards, speak of a model."""
    try:
        yield
    except MissingExtraError:
        raise
    except InvalidInputError as error:
        message = str(error)
        if "`reward`" not in message and "`model`" not in message:
            message = f"`model`: {message}"
        raise InvalidInputError(message.replace("`reward`", "`model`")) from error


def _folder(name: object) -> Path | None:
    """The folder of a model of somebody's own; None where the name is no such folder."""
    if not isinstance(name, str) or not name:
        return None
    try:
        folder = Path(name).expanduser()
        return folder if is_own_model(folder) else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such home
        return None
