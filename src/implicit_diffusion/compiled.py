"""`torch.compile` by a fixed rule: all of a function or nothing.

A function that differentiates inside (∇V) compiles where torch can trace autograd. Whatever stands in the way, no C++
compiler, a reward that leaves torch, is said in one line, and the function runs as it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch

from implicit_diffusion.showing import Shown


class Compiled(Shown):
    """A function that is compiled in full at its first call, or not at all. A copy of it is compiled at its own.

    Args:
        function: or module.
        differentiates: whether it calls autograd inside.
        dynamic: as in `torch.compile`; None for inputs whose batch changes, such as a filling queue's.

    Attributes:
        reason: why it runs uncompiled, in one line; None where it does not.
    """

    def __init__(
        self, function: Callable[..., Any], *, differentiates: bool = True, dynamic: bool | None = False
    ) -> None:
        self.function, self.differentiates, self.dynamic = function, differentiates, dynamic
        able = not differentiates or hasattr(_config(), SWITCH)
        self.reason = None if able else "torch cannot trace autograd"
        self._compiled: Callable[..., Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        function = copy.deepcopy(self.function, memo)
        return Compiled(function, differentiates=self.differentiates, dynamic=self.dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reason is not None:
            return self.function(*args, **kwargs)
        if self._compiled is not None:
            return self._run(args, kwargs)
        self._compiled = torch.compile(self.function, fullgraph=True, dynamic=self.dynamic)
        try:
            return self._run(args, kwargs)
        except Exception as error:  # whatever dynamo and inductor raise, by kind of obstacle
            result = self.function(*args, **kwargs)  # an error of the function's own is raised here as it is
            self.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            warnings.warn(f"not compiled, runs eagerly: {self.reason}", stacklevel=3)
            return result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._compiled is not None
        if not self.differentiates:  # a network, beside whose call setting a limit costs nothing
            with _config().patch({"recompile_limit": SETTINGS["recompile_limit"]}):
                return self._compiled(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except (
            _dynamo().exc.TorchDynamoException
        ):  # a call that has to compile (again) needs the settings, the others do not
            with _config().patch(SETTINGS):
                return self._compiled(*args, **kwargs)


SWITCH = "trace_autograd_ops"
SETTINGS = {SWITCH: True, "recompile_limit": 10**6}  # every loop compiles an inner update of its own


def _dynamo() -> Any:
    import torch._dynamo

    return torch._dynamo


def _config() -> Any:
    return _dynamo().config
