"""The process of a scorer: a reward of a file, loaded and called by the python of another environment.

    {"load": PATH, "function": NAME, "arguments": CALL} + its bytes  →  {"parameters": …, "files": …}
    {"call": [samples, condition], "seed": WORDS} + samples          →  {"returned": …} + rewards
    whatever the file raises                                         →  {"raised": WORDS, "line": NUMBER}
    a name in the file that is no reward                             →  {"refused": WORDS}

Messages come by standard input and go by standard output. What the file and its libraries print goes to standard error
instead, also if they write to the descriptor. The process ends when its input does, which happens however the run ends.

This file is run by path. Nothing of this package is imported, since the environment need not have it, and what it needs
is NumPy and safetensors.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import io
import json
import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
GRACE = 5.0  # seconds that a reward has to return when the run has ended


class RefusedError(Exception):
    """A name in the file that is no reward."""


def main() -> None:
    """Answer messages until the input ends."""
    receiving, sending = _streams()
    sys.path[:] = [place for place in sys.path if os.path.realpath(place) != os.path.realpath(HERE)]
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the run
    try:
        messages: Any = _module("implicit_diffusion_messages", os.path.join(HERE, "messages.py"))
    except ModuleNotFoundError as error:
        sending.write(json.dumps({"missing": error.name, "bytes": 0}).encode() + b"\n")
        sending.flush()
        return
    inbox: queue.Queue = queue.Queue()
    threading.Thread(target=_receive, args=(messages, receiving, inbox), daemon=True).start()
    reward = file = None
    for head, arrays in iter(inbox.get, None):
        returned: dict = {}
        try:
            if "load" in head:
                file = head["load"]
                reward, answer = _load(head, arrays["code"].tobytes())
            else:
                answer = {"returned": messages.pack(_call(messages, reward, head, arrays), returned)}
        except RefusedError as error:
            answer = {"refused": str(error)}
        except (Exception, SystemExit) as error:
            answer, returned = _described(error, file), {}
        sending.write(messages.frame(answer, returned))
        sending.flush()


def _streams() -> tuple[io.BufferedIOBase, io.BufferedIOBase]:
    """The pipes of the protocol, on descriptors of their own; 0 reads nothing, 1 writes to standard error."""
    receiving, sending = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return receiving, sending


def _receive(messages: Any, stream: io.BufferedIOBase, inbox: queue.Queue) -> None:
    """Read messages as they come, so that the end of the run is noticed while a reward is computed."""
    for message in iter(lambda: messages.read(stream), None):
        inbox.put(message)
    inbox.put(None)
    time.sleep(GRACE)
    os._exit(1)


def _load(head: dict[str, Any], code: bytes) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Execute a file, from the very bytes that were read by the run, and make its reward."""
    path, name = head["load"], head["function"]
    folder = os.path.dirname(path)
    sys.path.append(folder)  # behind what is installed
    module = ModuleType("reward " + os.path.basename(path))
    module.__file__ = path
    sys.modules[module.__name__] = module  # so that its dataclasses find it
    exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)
    target = getattr(module, name, None)
    if not callable(target):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RefusedError(f"{path} has no function {name!r}; it has {', '.join(callables) or 'none'}")
    reward = _made(target, head["arguments"])
    if not callable(reward):
        raise RefusedError(f"{name}{head['arguments']} must make a function of images, got {type(reward).__name__}")
    for network in _networks(reward):
        network.eval()
    files = {getattr(each, "__file__", None) for each in list(sys.modules.values())}
    beside = sorted(file for file in files if isinstance(file, str) and file.startswith(folder + os.sep))
    return reward, {"parameters": _parameters(reward), "files": beside}


def _made(target: Any, call: str) -> Callable[..., Any]:
    """The reward that a class, a factory or a function becomes with its arguments, which are literals."""
    if not call and not inspect.isclass(target):
        return target
    node: Any = ast.parse("f" + (call or "()"), mode="eval").body
    positional = [ast.literal_eval(value) for value in node.args]
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    if not inspect.isclass(target) and named and not positional and not _binds(target, named):
        return functools.partial(target, **named)  # a function of the samples, and these are its other arguments
    return target(*positional, **named)


def _binds(target: Callable[..., Any], named: dict[str, Any]) -> bool:
    try:
        inspect.signature(target).bind(**named)
    except TypeError:
        return False
    return True


def _parameters(reward: Callable[..., Any]) -> list[list[Any]] | None:
    """Name, kind, whether there is a default, and annotation of each parameter; None where they are not known."""
    function: Any = reward.forward if next(_networks(reward), None) is reward else reward
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # names that only a type checker imports, or an old Python
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # built-in functions may have no signature
            return None
    return [
        [p.name, int(p.kind), p.default is not p.empty, _words(p.annotation)] for p in signature.parameters.values()
    ]


def _words(annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _networks(value: Any, depth: int = 2) -> Iterator[Any]:
    """The torch modules that a reward is or holds."""
    torch = sys.modules.get("torch")
    if torch is None or isinstance(value, (torch.Tensor, type, ModuleType)):
        return
    if isinstance(value, torch.nn.Module):
        yield value
    elif depth:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        owner = [getattr(value, "__self__", None), getattr(value, "func", None)]
        for part in (*parts, *owner, *getattr(value, "__dict__", {}).values()):
            yield from _networks(part, depth - 1)


def _call(messages: Any, reward: Any, head: dict[str, Any], arrays: dict) -> Any:
    """What the reward returns. What it draws from the global generators follows from the message."""
    arguments = messages.unpack(head["call"], arrays)
    import numpy as np

    words = head["seed"]
    random.seed(sum(word << 32 * i for i, word in enumerate(words)))
    np.random.seed(words)  # noqa: NPY002 — it is what rewards may draw from
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(words[0] << 32 | words[1])
    with nullcontext() if torch is None else torch.no_grad():
        return reward(*arguments)


def _described(error: BaseException, file: str | None) -> dict[str, Any]:
    """What was raised, in one line, and the last line of the file on the way there."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == file]
    words = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines()
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    line = lines[-1] if lines else None
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return {"raised": ": ".join([type(error).__name__, *words[:1]]), "line": line, "not_installed": missing}


def _module(name: str, path: str) -> ModuleType:
    """A file beside this one, under a name that nobody else's module has."""
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
