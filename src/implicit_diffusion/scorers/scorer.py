"""A reward that another python computes.

    samples, condition  →  pipe  →  R(samples, condition) in the other environment  →  pipe  →  what R returned

A scorer is a function with the parameters of the one that it stands for, annotations included. What calls it converts
samples to pictures or arrays as it does for a function of this process (`reward_values`), and they cross as they are.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from implicit_diffusion.errors import InvalidInputError, RewardError, check_number, check_path, check_type
from implicit_diffusion.scorers.messages import Arrays, pack, unpack
from implicit_diffusion.scorers.process import LostError, Process
from implicit_diffusion.showing import Shown

TIMEOUT = 600.0  # seconds: large models take minutes to load
STARTS = 3  # of a process for one answer
WORDS = 8  # of 32 bits in a seed
_open: weakref.WeakSet[Scorer] = weakref.WeakSet()


class Scorer(Shown):
    """A reward of a file that runs in a process of its own, by the python of another environment.

    That environment needs NumPy and safetensors, and whatever the file imports. Tensors arrive on the CPU; a function
    that is to be called with them needs torch there too. What is returned has no gradient.

    The process starts here, and ends when `close` is called, when a block `with Scorer(…) as reward:` is left, or when
    this process ends, however it does. A process that has died or does not answer is started again, with a line that
    says so, and asked again, twice at most. What the reward draws from the global generators of Python, NumPy and torch
    follows from torch's global generator in this process, of which each call uses a few numbers.

    Args:
        file: FILE.py, which runs in the other process only.
        function: its function, class, factory or instance, as in `load_reward`.
        arguments: literal arguments for it with their parentheses, such as "(weight=2)".
        python: that runs it, such as ENVIRONMENT/bin/python; by default the one that runs this.
        timeout: seconds that it may take to load, and to score a batch.
        code: the contents of the file, where they have been read.

    Raises:
        InvalidInputError: there is no such file or python, the python lacks a package, whatever the file raises.
    """

    def __init__(
        self,
        file: str | PathLike[str],
        function: str,
        arguments: str = "",
        *,
        python: str | PathLike[str] = sys.executable,
        timeout: float = TIMEOUT,
        code: bytes | None = None,
    ) -> None:
        check_type("function", function, str, "name a function, class or instance of the file")
        check_type("arguments", arguments, str, 'write them with their parentheses, as in "(weight=2)"')
        self.file = check_path("file", file).absolute()
        self.python = check_path("python", python).absolute()  # links lead out of an environment: not resolved
        self.timeout = check_number("timeout", timeout, 0.0)
        self.function, self.arguments = function, arguments
        if code is None:
            if not self.file.is_file():
                raise InvalidInputError(f"`reward`: there is no file {self.file}")
            code = self.file.read_bytes()
        self._code, self._closed = code, False
        self._process: Process | None = None
        try:
            loaded = self._started()[1]
        except (LostError, RewardError) as error:
            raise InvalidInputError(_of(error, f"`reward` {self._name}: ")) from error
        if loaded["parameters"] is not None:
            self.__signature__ = inspect.Signature([_parameter(*each) for each in loaded["parameters"]])
        self.files = tuple(map(Path, loaded["files"]))  # beside the file that it has imported
        _open.add(self)

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns for these arguments, with tensors on the CPU.

        Args:
            arguments: tensors, arrays, PIL images, words, numbers, and lists, tuples and dicts of them.

        Raises:
            RewardError: whatever the function raises; a process that has died, or not answered, several times in a row.
            InvalidInputError: the scorer is closed.
        """
        if self._closed:
            raise InvalidInputError(f"`reward` {self._name}: the scorer is closed; make another one")
        arrays: Arrays = {}
        seed = torch.randint(2**32, (WORDS,), generator=torch.default_generator).tolist()
        head = {"call": pack(list(arguments), arrays), "seed": seed}
        for start in range(1, STARTS + 1):
            try:
                answer, returned = (self._process or self._started()[0]).ask(head, arrays, self.timeout)
            except LostError as error:
                self._process = None
                if start == STARTS:
                    raise RewardError(f"`reward` {self._name}: {error} ({STARTS} times in a row)") from error
                print(f"reward    {self._name}: {error}; started again ({start} of {STARTS - 1})")
            except BaseException:  # an interrupt
                self._process = None
                raise
            else:
                return unpack(self._checked(answer)["returned"], returned)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the process; what is closed already stays so."""
        process, self._process, self._closed = self._process, None, True
        _open.discard(self)
        if process is not None:
            process.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()

    def _words(self) -> Iterator[str]:
        yield from (self._name, f"python={self.python}", f"timeout={self.timeout:g}", *["closed"] * self._closed)

    @property
    def _name(self) -> str:
        return f"{self.file.name}:{self.function}{self.arguments}"

    def _started(self) -> tuple[Process, dict[str, Any]]:
        """A new process that has loaded the reward, and what it says of it."""
        process = Process(self.python)
        try:
            head = {"load": str(self.file), "function": self.function, "arguments": self.arguments}
            code = np.frombuffer(self._code, dtype=np.uint8)
            answer = self._checked(process.ask(head, {"code": code}, self.timeout)[0])
        except BaseException:
            process.close()
            raise
        self._process = process
        return process, answer

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer that is no error.

        Raises:
            InvalidInputError: the python lacks a package of ours, or torch for tensors; the file has no such reward.
            RewardError: whatever the file raised.
        """
        if "missing" in answer:
            raise InvalidInputError(
                f"`python` {self.python} has no {answer['missing']}, which a scorer needs; "
                f"{self._install('numpy', 'safetensors')}"
            )
        if "refused" in answer:
            raise InvalidInputError(f"`reward`: {answer['refused']}")
        if "raised" not in answer:
            return answer
        missing, line = answer["not_installed"], answer["line"]
        if missing == "torch" and line is None:
            raise InvalidInputError(
                f"`reward` {self._name} would be called with tensors, and `python` {self.python} has no torch; "
                f"annotate its first argument as np.ndarray or list[PIL.Image.Image], or {self._install('torch')}"
            )
        if missing == "PIL":
            missing = "pillow"
        where = self._name if line is None else f"{self.file}:{line}"
        advice = f"; {self._install(missing)}" if missing else ""
        raise RewardError(f"`reward` {where}: {answer['raised']}{advice}")

    def _install(self, *packages: str) -> str:
        return f"install it with: {self.python} -m pip install {' '.join(packages)}"


@contextmanager
def closing() -> Iterator[None]:
    """Close the scorers that are made inside the block when it is left."""
    before = set(_open)
    try:
        yield
    finally:
        for scorer in set(_open) - before:
            scorer.close()


def _parameter(name: str, kind: int, default: bool, annotation: str | None) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect._ParameterKind(kind),
        default=None if default else empty,
        annotation=empty if annotation is None else annotation,
    )


def _of(error: Exception, before: str) -> str:
    """The message of an error, which begins with `before`."""
    return str(error) if str(error).startswith("`") else f"{before}{error}"
