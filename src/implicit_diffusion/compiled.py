"""`torch.compile` for a whole function, or not at all.

A function that differentiates inside (∇V) can be compiled where torch can trace autograd. Where compilation fails, for
lack of a C++ compiler or because a reward leaves torch, a warning says why in one line, and the function runs eagerly.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch

from implicit_diffusion.showing import Shown


class Compiled(Shown):
    """A function that is compiled in full at its first call, or not at all. A copy is compiled at its own first call.

    Args:
        function: a function or module.
        differentiates: whether it calls autograd inside.
        dynamic: as in `torch.compile`; None for inputs whose batch size changes, such as those of a filling queue.

    Attributes:
        reason: why it runs eagerly, in one line; None if it is compiled.
    """

    def __init__(
        self, function: Callable[..., Any], *, differentiates: bool = True, dynamic: bool | None = False
    ) -> None:
        self.function, self.differentiates, self.dynamic = function, differentiates, dynamic
        able = not differentiates or hasattr(_config(), SWITCH)
        self.reason = None if able else "torch cannot trace autograd"
        self._compiled: Callable[..., Any] | None = None

    def stay_eager(self, reason: str) -> None:
        """Do not compile, and say why, as where compilation fails."""
        self.reason = reason
        warnings.warn(f"not compiled, runs eagerly: {reason}", stacklevel=4)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        function = copy.deepcopy(self.function, memo)
        return Compiled(function, differentiates=self.differentiates, dynamic=self.dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reason is not None:
            return self.function(*args, **kwargs)
        if self._compiled is not None:
            return self._run(args, kwargs)
        self._compiled = torch.compile(_by_itself(self.function), fullgraph=True, dynamic=self.dynamic)
        try:
            return self._run(args, kwargs)
        except Exception as error:  # dynamo and inductor raise many
            result = self.function(*args, **kwargs)  # an error of the function itself is raised here
            self.stay_eager(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            return result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._compiled is not None
        if not self.differentiates:  # a network, whose call takes much longer than setting a limit
            with _config().patch({"recompile_limit": SETTINGS["recompile_limit"]}):
                return self._compiled(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except (
            _dynamo().exc.TorchDynamoException
        ):  # a call that has to compile (again) needs the settings, the others do not
            with _config().patch(SETTINGS):
                return self._compiled(*args, **kwargs)


class CompiledAt(Shown):
    """A network that is compiled for some calls, and runs as it is in all others.

    A graph serves one number of samples, with gradients or without. A queue that fills, and evaluations, call with
    numbers that come once or seldom.

    Args:
        network: called with a batch first.
        calls: numbers of samples, and whether gradients are enabled.
    """

    def __init__(self, network: Callable[..., Any], calls: Iterable[tuple[int, bool]]) -> None:
        self.network, self.calls = network, frozenset(calls)
        self.compiled = Compiled(network, differentiates=False)
        self.is_complete = False

    def complete(self) -> None:
        """Compile nothing any more: what no graph serves runs as it is, such as u_0 on as many samples as u_θ."""
        self.is_complete = True

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (len(x), torch.is_grad_enabled()) not in self.calls:
            return self.network(x, *args, **kwargs)
        with torch.compiler.set_stance("eager_on_recompile") if self.is_complete else nullcontext():
            return self.compiled(x, *args, **kwargs)


def _by_itself(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method with code of its own. Dynamo keeps what it has compiled by code, and would compare the arguments of this
    one with those of all other objects of the class; where they hold fewer tensors, that fails.
    """
    if not isinstance(function, MethodType) or not isinstance(function.__func__, FunctionType):
        return function
    plain = function.__func__
    own = FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    own.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(own, function.__self__)


SWITCH = "trace_autograd_ops"
SETTINGS = {SWITCH: True, "recompile_limit": 10**6}  # every loop compiles an inner update of its own


def _dynamo() -> Any:
    import torch._dynamo

    return torch._dynamo


def _config() -> Any:
    return _dynamo().config
