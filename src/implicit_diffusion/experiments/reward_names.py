"""Rewards by name: shipped ones, or a function of the user's own module or file."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import digits, rewards

SHIPPED = "brightness, darkness, redness, digit-0 … digit-9 (log-probability of a class under the digits classifier)"


def load_reward(name: str) -> Callable[[Tensor], Tensor]:
    """The reward called `name`: a shipped one such as "brightness" or "digit-3", "module:function", "file.py:function".

    A file or module that the user names is imported, and so executed; a network found there is put in eval mode.

    Raises:
        InvalidInputError: nothing of that name; the message says what was looked for.
    """
    if name in ("brightness", "darkness", "redness"):
        return getattr(rewards, name)
    if match := re.fullmatch(r"digit-(\d)", name):
        return digits.digit_log_probability(int(match[1]))
    place, colon, function = name.rpartition(":")
    if not colon:
        raise InvalidInputError(f"--reward {name!r} is neither {SHIPPED}, nor of the form FILE.py:function")
    module = _load_file(Path(place)) if place.endswith(".py") else _import(place)
    found = getattr(module, function, None)
    if not callable(found):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InvalidInputError(
            f"--reward: {place} has no function {function!r}; it has {', '.join(callables) or 'none'}"
        )
    return found.eval() if isinstance(found, nn.Module) else found


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidInputError(f"--reward: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that its dataclasses and pickles of its own find it
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            f"--reward: no module {name!r} ({error}); run from its folder, or name it as FILE.py:function"
        ) from error
