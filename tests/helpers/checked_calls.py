"""Types and shapes of every call, checked for less than `jaxtyping.jaxtyped` costs: it took a third of the tests' time.

jaxtyping binds the arguments to the signature, checks them before the call, and checks them again with the result after
it. Here each is checked once, and a scope for the names of axes begins only where an annotation has shapes. The checks
of a function are made when it is first called, and serve every function of the same code: one that is defined within
another is defined anew by every call of that one. In a test the first calls of every function are checked, `ENOUGH` of
them: loops call the same thousands of times. Of a list beartype checks one item, which it draws from Python's global
generator; here it has a generator of its own, so that checks change no run. What is checked is the same: every
annotation that can be resolved, with one size for each name in a call. What is neither a plain function nor a dataclass
is left to jaxtyping.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

of_jaxtyping, config = jaxtyping.jaxtyped, jaxtyping.config
SCOPE = of_jaxtyping("context")
ENOUGH = 100
CONF = BeartypeConf(violation_type=jaxtyping.TypeCheckError)  # a TypeError, as jaxtyping raises it
DRAW = random.Random(0).getrandbits


def checked(function=None, *, typechecker):
    """In place of `jaxtyping.jaxtyped`: decorates functions, and the `__init__` of dataclasses."""
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if is_dataclass(function) and isinstance(function.__init__, FunctionType):
        function.__init__ = checked(function.__init__, typechecker=typechecker)
        return function
    if hasattr(function, "is_checked"):  # the `__init__` of a dataclass, its own or its parent's
        return function
    if not isinstance(function, FunctionType) or inspect.isgeneratorfunction(function):
        return of_jaxtyping(function, typechecker=lambda each: _drawing_its_own(typechecker(each)))

    checks: Checks | None = None

    def inside(args, kwargs):  # a frame of its own, as jaxtyping's: warnings count frames
        __tracebackhide__ = True
        assert checks is not None
        checks.arguments(*args, **kwargs)
        return checks.result(function(*args, **kwargs))

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checks
        __tracebackhide__ = True
        checks = checks or checks_of(function)
        if config.jaxtyping_disable or checks.are_enough():
            return function(*args, **kwargs)
        if not checks.have_shapes:
            return inside(args, kwargs)
        with SCOPE:
            return inside(args, kwargs)

    call.is_checked = True
    return call


@dataclass(eq=False)
class Checks:
    """What a call of a function is checked by, and how many were in the present test."""

    code: CodeType
    have_shapes: bool
    arguments: Callable[..., None]
    result: Callable[[Any], Any]
    test: int = 0
    calls: int = 0

    def are_enough(self) -> bool:
        """Whether this call is beyond those of a test that are checked."""
        if self.test != tests_begun:
            self.test, self.calls = tests_begun, 0
        self.calls += 1
        return self.calls > ENOUGH


CHECKS: dict[int, Checks] = {}
tests_begun = 0


def begin_test() -> None:
    """Check the next calls of every function again."""
    global tests_begun
    tests_begun += 1


def checks_of(function):
    """The checks of all functions with the code of this one."""
    code = function.__code__
    if id(code) not in CHECKS:  # an entry keeps its code, so no other has its id
        hints = {name: _resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
        have_shapes, result = any(map(_has_shapes, hints.values())), _result(hints.pop("return", Any))
        CHECKS[id(code)] = Checks(code, have_shapes, _arguments(function, hints), result)
    return CHECKS[id(code)]


def _arguments(function, hints):
    """A function that takes and checks the same arguments, and does nothing."""
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    bare = inspect.Signature([p.replace(annotation=empty, default=empty) for p in parameters])
    scope: dict[str, Any] = {}
    exec(f"def {function.__name__}{bare}: pass", scope)
    same = scope[function.__name__]
    same.__defaults__, same.__kwdefaults__, same.__annotations__ = function.__defaults__, function.__kwdefaults__, hints
    same.__module__, same.__qualname__ = function.__module__, function.__qualname__
    return _checker(same)


def _result(hint):
    """A function that checks a result, and returns it."""

    def result(value):
        return value

    result.__annotations__ = {"return": hint}
    return _checker(result)


def _checker(function):
    """Not what the plugin passes: that is beartype, whose violations are no TypeErrors."""
    return _drawing_its_own(beartype(function, conf=CONF))


def _drawing_its_own(check):
    """The check, which holds the generator that it draws from as the default of a hidden argument."""
    for name, value in (getattr(check, "__kwdefaults__", None) or {}).items():
        if value == random.getrandbits:
            check.__kwdefaults__[name] = DRAW
    return check


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """An annotation as an object; anything where it has a name that is not known yet."""

    def holder(value): ...

    holder.__annotations__ = {"value": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:  # as jaxtyping does
        return Any


def _has_shapes(hint: Any) -> bool:
    if isinstance(hint, list):  # the arguments of a callable
        return any(map(_has_shapes, hint))
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shapes, get_args(hint)))
