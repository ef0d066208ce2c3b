"""`torch.compile` by a fixed rule: all of a function or nothing.

A function that differentiates inside (∇V) compiles where torch can trace autograd. Whatever stands in the way, no C++
compiler, a reward that leaves torch, is said in one line, and the function runs as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


class Compiled:
    """A function that is compiled in full at its first call, or not at all.

    Attributes:
        reason: why it runs uncompiled, in one line; None where it does not.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.reason = function, None if hasattr(_config(), SWITCH) else "torch cannot trace autograd"
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.reason is not None:
            return self.function(*args)
        if self._compiled is not None:
            return self._run(args)
        self._compiled = torch.compile(self.function, fullgraph=True, dynamic=False)
        try:
            return self._run(args)
        except Exception as error:  # whatever dynamo and inductor raise, by kind of obstacle
            result = self.function(*args)  # an error of the function's own is raised here as it is
            self.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            warnings.warn(f"not compiled, runs eagerly: {self.reason}", stacklevel=3)
            return result

    def _run(self, args: tuple[Any, ...]) -> Any:
        assert self._compiled is not None
        try:
            return self._compiled(*args)
        except (
            _dynamo().exc.TorchDynamoException
        ):  # a call that has to compile (again) needs the settings, the others do not
            with _config().patch(SETTINGS):
                return self._compiled(*args)


SWITCH = "trace_autograd_ops"
SETTINGS = {SWITCH: True, "recompile_limit": 10**6}  # every loop compiles an inner update of its own


def _dynamo() -> Any:
    import torch._dynamo

    return torch._dynamo


def _config() -> Any:
    return _dynamo().config
