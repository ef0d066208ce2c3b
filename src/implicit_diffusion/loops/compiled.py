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
        first = self._compiled is None
        if self._compiled is None:
            self._compiled = torch.compile(self.function, fullgraph=True, dynamic=False)
        try:
            with _config().patch(SETTINGS):
                return self._compiled(*args)
        except Exception as error:  # whatever dynamo and inductor raise, by kind of obstacle
            if not first:
                raise
            result = self.function(*args)  # an error of the function's own is raised here as it is
            self.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            warnings.warn(f"not compiled, runs eagerly: {self.reason}", stacklevel=3)
            return result


SWITCH = "trace_autograd_ops"
# Read when a call compiles, which a later one may do again; every loop compiles its own inner update.
SETTINGS = {SWITCH: True, "recompile_limit": 10**6}


def _config() -> Any:
    import torch._dynamo

    return torch._dynamo.config
