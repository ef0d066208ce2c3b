"""The process of a scorer as the run sees it: messages with a time-out, what it printed last, and its end.

It leads a session of its own, so that Ctrl-C reaches the run alone. Its input is a pipe whose only writer is the run:
however the run ends, the input ends, and the process with it (see `child`).
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.scorers.messages import Arrays, frame, size_of, unframed

CHILD = Path(__file__).with_name("child.py")
CHUNK = 2**20  # bytes that are written or read at once
KEPT = 8  # lines of what was printed last
GRACE = 5.0  # seconds for a process to end by itself
OF_THE_RUN = ("RANK", "WORLD_SIZE", "GROUP_", "LOCAL_", "MASTER_", "ROLE_", "TORCHELASTIC_")  # of several processes
VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version
words = ["%d.%d" % sys.version_info[:2]]
for package in ("numpy", "pillow", "safetensors", "torch", "transformers"):
    try:
        words.append(package + " " + version(package))
    except PackageNotFoundError:
        pass
print(", ".join(words))
"""


class LostError(Exception):
    """The process has ended, or does not answer in time; the message says which, and what it printed last."""


class Process:
    """A child process that answers messages, one at a time.

    Args:
        python: that runs it.

    Raises:
        InvalidInputError: there is no such python.
    """

    def __init__(self, python: Path) -> None:
        check_python(python)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_RUN)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [str(python), str(CHILD)],
            bufsize=0,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        os.set_blocking(self._output.fileno(), False)
        self._printed: deque[str] = deque(maxlen=KEPT)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ask(self, head: Mapping[str, Any], arrays: Arrays, timeout: float) -> tuple[dict[str, Any], Arrays]:
        """Send a message and wait for the answer.

        Whatever ends the waiting, an interrupt as well, ends the process: its answer would come to the next question.

        Args:
            head: of the message.
            arrays: of the message.
            timeout: seconds.

        Raises:
            LostError: the process has ended, or there is no answer in time.
        """
        try:
            return self._exchange(frame(dict(head), arrays), time.monotonic() + timeout)
        except _EndedError as error:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
            status = self._process.poll()
            self.kill()
            raise LostError(f"its process {_ending(status)}{self._last_words()}") from error
        except TimeoutError as error:
            self.kill()
            words = f"its process does not answer within {timeout:g} s (`timeout`){self._last_words()}"
            raise LostError(words) from error
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """Let the process end by itself, or kill it after a few seconds."""
        with suppress(OSError):
            self._input.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self.kill()

    def kill(self) -> None:
        """End the process and those that it has started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._listener.join(GRACE)
        for stream in (self._input, self._output, self._process.stderr):
            with suppress(OSError):
                if stream is not None:
                    stream.close()

    def _exchange(self, message: bytes, deadline: float) -> tuple[dict[str, Any], Arrays]:
        """Write and read side by side, as far as the pipes take and give it."""
        unsent, answer, size = memoryview(message), bytearray(), -1
        with selectors.DefaultSelector() as selector:
            selector.register(self._input, selectors.EVENT_WRITE)
            selector.register(self._output, selectors.EVENT_READ)
            while True:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fileobj is self._input:
                        unsent = unsent[self._write(unsent) :]
                        if not unsent:
                            selector.unregister(self._input)
                        continue
                    part = os.read(self._output.fileno(), CHUNK)
                    if not part:
                        raise _EndedError
                    answer += part
                    end = answer.find(b"\n") + 1 if size < 0 else size
                    if size < 0 and end:
                        size = end + size_of(bytes(answer[:end]))
                    if 0 <= size <= len(answer):
                        line, _, file = bytes(answer).partition(b"\n")
                        return unframed(line, file)

    def _write(self, unsent: memoryview) -> int:
        try:
            return os.write(self._input.fileno(), unsent[:CHUNK])
        except BlockingIOError:
            return 0
        except BrokenPipeError as error:
            raise _EndedError from error

    def _listen(self) -> None:
        """Pass on what is printed, so that the pipe does not fill, and keep the last lines."""
        assert self._process.stderr is not None
        with suppress(OSError, ValueError):
            for line in iter(self._process.stderr.readline, b""):
                text = line.decode(errors="replace")
                self._printed.append(text.strip())
                with suppress(Exception):  # the run's own output may be closed
                    sys.stderr.write(text)

    def _last_words(self) -> str:
        printed = " | ".join(line for line in self._printed if line)
        return f"; it printed last: {printed}" if printed else "; it printed nothing"


class _EndedError(Exception):
    """The output of the process has ended, or its input."""


def check_python(python: Path) -> None:
    """Raise `InvalidInputError` unless there is such a program."""
    if python.is_dir():
        inside = python / "bin" / "python"
        raise InvalidInputError(
            f"`python` must be the python of an environment, got the folder {python}"
            + (f"; use {inside}" if inside.exists() else "")
        )
    if not python.is_file() or not os.access(python, os.X_OK):
        raise InvalidInputError(
            f"`python`: there is no program {python}; give the python of an environment, such as ENVIRONMENT/bin/python"
        )


def versions(python: Path) -> str:
    """The version of a python, and those of the packages that rewards are often made of.

    Raises:
        InvalidInputError: there is no such program, or it is no python.
    """
    check_python(python)
    try:
        done = subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise InvalidInputError(f"`python`: {python} cannot be used as a python: {error}") from error
    return done.stdout.strip()


def _ending(status: int | None) -> str:
    if status is None:
        return "has closed its output"
    if status < 0:
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
