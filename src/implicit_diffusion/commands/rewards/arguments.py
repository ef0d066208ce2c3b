"""The arguments in a reward's name, FILE.py:Class(weight=2), and the reward that they make.

Arguments are literals: numbers, strings, True, False, None, and tuples, lists, dicts and sets of them. They are read,
never evaluated.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from implicit_diffusion.commands.rewards.trust import spelled
from implicit_diffusion.errors import InvalidInputError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def read_arguments(name: str, call: str) -> Arguments:
    """Positional and keyword arguments of a call "(...)", as literals.

    Raises:
        InvalidInputError: this is not a call, or an argument is not a literal; the message names it.
    """
    try:
        node = ast.parse(f"f{call}", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InvalidInputError(
            f"`reward` {name}: {call} cannot be read as arguments: {getattr(error, 'msg', error)}"
        ) from error
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise InvalidInputError(f"`reward` {name}: {call} cannot be read as arguments; write them as (1, weight=2)")
    positional = tuple(_literal(name, value, "") for value in node.args)
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise InvalidInputError(f"`reward` {name}: ** cannot be used here; write each as name=value")
        named[keyword.arg] = _literal(name, keyword.value, f"{keyword.arg}=")
    return positional, named


def made(name: str, target: Callable[..., Any], arguments: Arguments | None) -> Callable[..., Tensor]:
    """The reward that a class, a factory or a function becomes with its arguments.

    A class is called with them, or with none where the name has no parentheses. So is a factory: a function that can be
    called with them alone. A function that needs the samples as well is a reward, and these are its other arguments.

    Args:
        name: of the reward, for messages.
        target: the class or function.
        arguments: from `read_arguments`; None where the name has no parentheses.

    Raises:
        InvalidInputError: arguments that do not fit, or a result that is not a function.
    """
    if arguments is None and not inspect.isclass(target):
        return target
    positional, named = arguments or ((), {})
    called = spelled(name).function
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # built-in functions need not have one
        signature = inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)])
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        if not inspect.isclass(target) and not positional and any(_binds(signature, n, named) for n in (1, 2)):
            return functools.partial(target, **named)
        bare = "" if positional or named or inspect.isclass(target) else "; name it without parentheses, or"
        raise InvalidInputError(
            f"`reward` {name}: {_misfit(signature, positional, named) or error}{bare or ';'} give its arguments, "
            f"{called}{_plainly(signature)}"
        ) from error
    reward = target(*positional, **named)
    if not callable(reward):
        raise InvalidInputError(
            f"`reward` {name}: {called}(...) must make a function of images, got {type(reward).__name__}; "
            + ("give the class a __call__(self, images)" if inspect.isclass(target) else "return a function of images")
        )
    return reward


def _literal(name: str, node: ast.expr, before: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        text = ast.unparse(node)
        text = text if len(text) <= 60 else f"{text[:60]}…"
        quotes = f'; put words in quotes, {before}"{text}"' if isinstance(node, ast.Name) else ""
        raise InvalidInputError(
            f"`reward` {name}: the argument {before}{text} is not a literal (a number, a string, True, False, None, or "
            f"a tuple, list or dict of them), and nothing else is evaluated{quotes}"
        ) from error


def _binds(signature: inspect.Signature, samples: int, named: dict[str, Any]) -> bool:
    """Whether a function can be called with the samples, with a condition too if `samples` is 2, and with these."""
    try:
        signature.bind(*range(samples), **named)
    except TypeError:
        return False
    return bool(named)


def _misfit(signature: inspect.Signature, positional: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Which of the arguments has no place, even if others are missing; empty where all have one."""
    try:
        signature.bind_partial(*positional, **named)
    except TypeError as error:
        return str(error)
    return ""


def _plainly(signature: inspect.Signature) -> str:
    """A signature with names and defaults, without types."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))
