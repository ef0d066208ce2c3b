"""Rewards by name: shipped ones, or a function of the user's own module or file."""

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
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.rewards import shipped as rewards
from implicit_diffusion.commands.rewards.arguments import Arguments, made, read_arguments
from implicit_diffusion.commands.rewards.trust import Code, code_of, remember, spelled
from implicit_diffusion.digits import digit_log_probability
from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError, RewardError, reason_of
from implicit_diffusion.frozen import modules_in
from implicit_diffusion.reward_values import takes_condition

SHIPPED = "brightness, darkness, redness, digit-0 … digit-9 (log-probability of a class under the digits classifier)"


def load_reward(name: str, device: torch.device | None = None) -> Callable[..., Tensor]:
    """The reward called `name`.

    It may be a shipped one, such as "brightness" or "digit-3", or the user's own, as "module:function" or
    "file.py:function". In place of a function that can be an instance, a class, or a class or factory with literal
    arguments, "file.py:Class(weight=2)" (`reward_arguments`).

    A file or module that the user names is imported, and so executed, and noted as one that this user has named
    (`reward_trust`). A file finds what lies beside it, also later, when it is called; it takes no other module's name,
    and installed modules come before those beside it. A network found there, or held by an instance, is put in eval
    mode.

    Args:
        name: of the reward.
        device: that networks are moved to; None leaves them where they are.

    Raises:
        InvalidInputError: nothing of that name, and the message says what was looked for; arguments that do not fit; or
            what the file raises.
    """
    place, function, call = spelled(name)
    shipped = re.fullmatch(r"brightness|darkness|redness|digit-(\d)", function)
    if shipped and not place:
        if call:
            raise InvalidInputError(f"--reward {name}: {function} takes no arguments; name it without parentheses")
        return digit_log_probability(int(shipped[1])) if shipped[1] else getattr(rewards, function)
    if not place:
        raise InvalidInputError(
            f"--reward {name!r} is neither {SHIPPED}, nor of the form FILE.py:function or FILE.py:Class(weight=2)"
        )
    if "(" in function:
        raise InvalidInputError(f"--reward {name}: the arguments end without a ), as in FILE.py:Class(weight=2)")
    arguments = read_arguments(name, call) if call else None
    paths = list(sys.path)
    try:
        return _function(name, arguments, device)
    except BaseException:
        sys.path[:] = paths
        raise


def _function(name: str, arguments: Arguments | None, device: torch.device | None) -> Callable[..., Tensor]:
    place, function, _ = spelled(name)
    with blamed(name):
        code = code_of(name)
        remember(code)
        module = _execute(code, Path(place).absolute()) if place.endswith(".py") else _import(place)
    found = getattr(module, function, None)
    if not callable(found):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InvalidInputError(
            f"--reward: {place} has no function {function!r}; it has {', '.join(callables) or 'none'}"
        )
    with blamed(name):
        reward = made(name, found, arguments)
    for network in modules_in(reward):
        network.eval()
        if device is not None:
            network.to(device)
    with blamed(name):
        takes_condition(reward)
    return _answering(reward, name)


def _answering(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """The same function, whose errors say where they come from, whenever in a run they come.

    Raises:
        RewardError: from the result, for whatever else than an error of ours is raised, a call of sys.exit included.
    """

    @functools.wraps(function)
    def answering(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ImplicitDiffusionError:
            raise
        except (Exception, SystemExit) as error:
            raise RewardError(_located(error, name)) from error

    forward = function.forward if isinstance(function, nn.Module) else function
    with suppress(TypeError, ValueError):  # built-in functions need not have one
        answering.__dict__["__signature__"] = inspect.signature(forward)
    return answering


def _located(error: BaseException, name: str) -> str:
    """A line that says what a reward of the user's own raised, and where."""
    place = spelled(name).place
    file = Path(place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None) or name)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file.absolute()]
    where = f"{file}:{lines[-1]}" if lines else name
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    what = error.msg if isinstance(error, SyntaxError) else reason_of(error)
    return f"--reward {where}: {type(error).__name__}: {what}"


@contextmanager
def blamed(name: str, must: str = "") -> Iterator[None]:
    """Turn whatever a reward of the user's own raises in the block into one line that says where.

    Args:
        name: of the reward, as given to `load_reward`.
        must: what it must do, for the end of the message.

    Raises:
        InvalidInputError: for every error but our own.
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
    """The module of a file, made of the very bytes that were read."""
    name = f"reward {path.stem} {code.digest[:12]}"  # which no other module has
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its dataclasses find it
    beside = str(path.parent)
    if beside not in sys.path:
        sys.path.append(beside)  # for good: functions import when they are called; last: nothing is shadowed
    exec(compile(code.content, str(path), "exec", dont_inherit=True), module.__dict__)
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            raise
        raise InvalidInputError(
            f"--reward: no module {name!r} ({error}); run from its folder, or name it as FILE.py:function"
        ) from error
