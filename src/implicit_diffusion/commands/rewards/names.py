"""Rewards by name: shipped ones, image–text models, or functions in a module or file of the user's own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.rewards.arguments import Arguments, made, read_arguments
from implicit_diffusion.commands.rewards.elsewhere import load_elsewhere
from implicit_diffusion.commands.rewards.shipped import SHIPPED
from implicit_diffusion.commands.rewards.trust import Code, code_of, image_text_model, remember, short, spelled
from implicit_diffusion.digits import digit_log_probability
from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError, RewardError, check_path, reason_of
from implicit_diffusion.frozen import modules_in
from implicit_diffusion.models.image_text import load_image_text
from implicit_diffusion.reward_values import of_frames, of_tensors, takes_condition, with_metadata
from implicit_diffusion.scorers import TIMEOUT

NAMES = (
    f"{', '.join(SHIPPED)}, digit-0 … digit-9 (log-probability of a class under the digits classifier), clip:MODEL (an "
    "image–text model of transformers)"
)


def load_reward(
    name: str,
    device: torch.device | None = None,
    *,
    python: str | PathLike[str] | None = None,
    timeout: float = TIMEOUT,
) -> Callable[..., Tensor]:
    """The reward called `name`.

    It may be

    - a shipped one, such as "brightness" or "digit-3";
    - "clip:MODEL", the similarity of images and prompts under a CLIP-like model of transformers, a folder or a hub id;
      or 'clip:MODEL(text="a red house")', that of images and one text (see `models.image_text`);
    - the user's own, "module:function" or "file.py:function". In place of the function there may be an instance, a
      class, or a class or factory with literal arguments: "file.py:Class(weight=2)" (see `rewards.arguments`).

    A file or module that the user names is imported, and so executed, and recorded as one that this user has named (see
    `rewards.trust`). A file can import what lies beside it, also later, when the reward is called; installed modules
    come before those beside it, and these before those beside rewards that were loaded earlier. The module of the file
    gets a name that no other module has. A network found there, or held by an instance, is put in eval mode.

    A shipped one, and "clip:MODEL", take the mean over the frames of videos (n, C, frames, H, W).

    What is returned is called with tensors, also where the reward is a function of arrays or pictures, to which they
    are converted then (see `reward_values`).

    Args:
        name: of the reward.
        device: that networks are moved to; None leaves them where they are.
        python: of another environment, which runs a file of the user's own in a process of its own (see `Scorer`). Its
            networks stay where the file puts them. None for this process.
        timeout: seconds that such a process may take to load, and to score a batch.

    Raises:
        InvalidInputError: there is no such reward, and the message says what was looked for; arguments that do not fit;
            whatever the file raises.
    """
    place, function, call = spelled(name)
    if not place:
        return of_frames(_image_text(name, device) if image_text_model(name) else _shipped(name))
    if "(" in function:
        raise InvalidInputError(f"`reward` {name}: the arguments end without a ), as in FILE.py:Class(weight=2)")
    arguments = read_arguments(name, call) if call else None
    if python is not None:
        return load_elsewhere(name, check_path("python", python).absolute(), timeout)
    with paths_kept():
        return _function(name, arguments, device)


@contextmanager
def paths_kept() -> Iterator[None]:
    """Where the block fails, imports find what they found before."""
    paths = list(sys.path)
    try:
        yield
    except BaseException:
        sys.path[:] = paths
        raise


def _shipped(name: str) -> Callable[..., Tensor]:
    _, function, call = spelled(name)
    digit = re.fullmatch(r"digit-(\d)", function)
    if digit is None and function not in SHIPPED:
        raise InvalidInputError(
            f"`reward` {name!r} is neither {NAMES}, nor of the form FILE.py:function or FILE.py:Class(weight=2)"
        )
    if call:
        raise InvalidInputError(f"`reward` {name}: {function} takes no arguments; name it without parentheses")
    return digit_log_probability(int(digit[1])) if digit else of_tensors(SHIPPED[function])


def _image_text(name: str, device: torch.device | None) -> Callable[..., Tensor]:
    """R(images, prompts), or R(images) with a text for all of them."""
    model, call = str(image_text_model(name)), spelled(name).call
    arguments = read_arguments(name, call) if call else ((), {})

    def similarity(text: str | None = None) -> str | None:
        return text

    try:
        text = similarity(*arguments[0], **arguments[1])
    except TypeError as error:
        raise InvalidInputError(f'`reward` {name}: {error}; give a text alone, clip:{model}(text="…")') from error
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise InvalidInputError(f"`reward` {name}: text must be words in quotes, got {text!r}")
    try:
        scores = load_image_text(model)
    except InvalidInputError as error:
        raise InvalidInputError(f"`reward` {short(name)}: {error}") from error
    if device is not None:
        scores.to(device)
    return scores if text is None else functools.partial(scores, prompts=text)


def function_of(name: str) -> Callable[..., Any]:
    """The function, class or instance that a name in a file or module of the user's own stands for.

    The file is executed, and recorded as one that this user has named.

    Raises:
        InvalidInputError: there is none of that name; whatever the file raises.
    """
    place, function, _ = spelled(name)
    with blamed(name):
        code = code_of(name)
        remember(code)
        module = _execute(code, Path(place).absolute()) if place.endswith(".py") else _import(place)
    target: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(target):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InvalidInputError(
            f"`reward`: {place} has no function {function!r}; it has {', '.join(callables) or 'none'}"
        )
    return target


def _function(name: str, arguments: Arguments | None, device: torch.device | None) -> Callable[..., Tensor]:
    target = function_of(name)
    with blamed(name):
        reward = made(name, target, arguments)
    for network in modules_in(reward):
        network.eval()
        if device is not None:
            network.to(device)
    with blamed(name):
        reward = with_metadata(reward)
        takes_condition(reward)
        reward = of_tensors(reward)
    return _with_named_errors(reward, name)


def _with_named_errors(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """The same function; its errors say where they come from, whenever in a run they come.

    Raises:
        RewardError: when called, for everything that the function raises except errors of ours; also for sys.exit.
    """

    @functools.wraps(function)
    def calling(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ImplicitDiffusionError:
            raise
        except (Exception, SystemExit) as error:
            raise RewardError(_located(error, name)) from error

    forward = function.forward if isinstance(function, nn.Module) else function
    with suppress(TypeError, ValueError):  # built-in functions need not have one
        calling.__dict__["__signature__"] = inspect.signature(forward)
    return calling


def _located(error: BaseException, name: str) -> str:
    """What a reward of the user's own raised, and where, in one line."""
    place = spelled(name).place
    file = Path(place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None) or name)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file.absolute()]
    where = f"{file}:{lines[-1]}" if lines else name
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    what = error.msg if isinstance(error, SyntaxError) else reason_of(error)
    return f"`reward` {where}: {type(error).__name__}: {what}"


@contextmanager
def blamed(name: str, must: str = "") -> Iterator[None]:
    """Turn whatever a reward of the user's own raises in the block into one line that says where.

    Args:
        name: of the reward, as given to `load_reward`.
        must: what it must do, for the end of the message.

    Raises:
        InvalidInputError: in place of every error except our own.
    """
    try:
        yield
    except RewardError as error:
        raise InvalidInputError(f"{error}{must}") from error
    except ImplicitDiffusionError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidInputError(f"{_located(error, name)}{must}") from error


def _execute(code: Code, path: Path) -> ModuleType:
    """The module of a file, made from the very bytes that were read."""
    name = f"reward {path.stem} {code.digest[:12]}"  # which no other module has
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its dataclasses find it
    _import_from(path.parent)
    exec(compile(code.content, str(path), "exec", dont_inherit=True), module.__dict__)
    return module


_folders: set[str] = set()  # beside the files of rewards, on sys.path for good: functions import when they are called


def _import_from(folder: Path) -> None:
    """Let imports find what lies in a folder: after all that is installed, before what lies beside earlier rewards.

    A module beside an earlier reward may have the name of one in this folder. It stays that reward's own, and this
    folder's is imported in its place.
    """
    place, earlier = str(folder), [beside for beside in sys.path if beside in _folders]
    if place not in sys.path or place in earlier:
        rest = [beside for beside in sys.path if beside not in _folders]
        sys.path[:] = [*rest, place, *(beside for beside in earlier if beside != place)]
        _folders.add(place)
    importlib.invalidate_caches()  # a folder's listing is out of date where files were made a moment ago
    packages = {file.parent.name for file in folder.glob("*/__init__.py")}
    for name in packages | {file.stem for file in folder.glob("*.py")}:
        file = Path(getattr(sys.modules.get(name), "__file__", None) or folder / name)
        home = file.parents[1] if file.stem == "__init__" else file.parent
        if str(home) in _folders - {place}:
            for taken in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[taken]


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            raise
        raise InvalidInputError(
            f"`reward`: no module {name!r} ({error}); run from its folder, or name it as FILE.py:function"
        ) from error
