"""What a run prints of its progress, on stderr: a progress bar on a terminal, plain lines elsewhere.

Of several processes, the main one prints. Printing never ends a run: where the reader is gone (`| head`, a closed
terminal, a full disk behind `>`), the run continues without output.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from implicit_diffusion.extras import require
from implicit_diffusion.processes import is_main
from implicit_diffusion.showing import Shown

REFRESH = 0.1  # seconds between two readings of the metrics on a terminal: each waits for the device
QUIET = 15.0  # seconds after which a plain line is due, even if less than a tenth of the steps were made

Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Print a line to stderr, where progress is printed too."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


class _Silenceable:
    """A text stream that goes silent once it cannot be written to; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        with self._silencing():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write the lines one by one."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or drop what could not be flushed."""
        with self._silencing():
            self._stream.flush()

    @contextmanager
    def _silencing(self) -> Iterator[None]:
        """If the block fails, discard what is buffered and all that follows: Python flushes once more at its end."""
        try:
            yield
        except (OSError, ValueError):
            if isinstance(sys.exception(), ValueError) and not self._stream.closed:
                raise
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def never_failing_output() -> Iterator[None]:
    """Within the block, printing never raises, even if the reader is gone or a character cannot be encoded."""
    before = sys.stdout, sys.stderr
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program began: no file of ours may take its place
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            stream = io.StringIO()
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # a terminal without β shows \u03b2
        setattr(sys, name, _Silenceable(stream))
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        sys.stdout, sys.stderr = before


class Progress(Shown):
    """The number of steps made out of `total`, and the metrics of the last one.

    Args:
        total: number of steps, ≥ 1.
        description: what is going on, in a word or two.
        done: steps that were made before.
    """

    def __init__(self, total: int, description: str, done: int = 0) -> None:
        self.total, self.description = total, description
        self.done = self._first = self._shown = min(done, total)
        self._metrics: Mapping[str, Any] = {}
        self._start = self._shown_at = time.monotonic()

    def update(self, metrics: Mapping[str, Any] | None = None, advance: int = 1) -> None:
        """Count `advance` steps.

        Args:
            metrics: the few numbers to print (floats or 0-d tensors), by name; words are printed as they are; None
                keeps the last ones.
            advance: steps made since the last call.
        """
        self.done = min(self.total, self.done + advance)
        self._metrics = self._metrics if metrics is None else metrics
        if self._is_due():
            self._show()
            self._shown, self._shown_at = self.done, time.monotonic()

    def advance(self, steps: int) -> None:
        """Count steps that have just been made, without metrics."""
        self.update(advance=steps)

    def skip(self, steps: int) -> None:
        """Count steps that were made before: they are left out of the estimate of the time that is left."""
        self._first += steps
        self.advance(steps)

    def close(self) -> None:
        """Print where it ended, if that has not been printed."""
        if self._shown < self.done:
            self._show()

    def _is_due(self) -> bool:
        tenths = 10 * self.done // self.total > 10 * self._shown // self.total
        return tenths or time.monotonic() - self._shown_at >= QUIET

    def _show(self) -> None:
        seconds = time.monotonic() - self._start
        percent = 100 * self.done // self.total
        made, left = self.done - self._first, self.total - self.done
        remaining = f", {seconds * left / made:.0f} s left" if made and left else ""
        line = f"{self.description}  {self.done}/{self.total} ({percent} %)  {seconds:.0f} s{remaining}"
        print(f"{line}  {_read(self._metrics)}".rstrip(), file=sys.stderr, flush=True)


class _Silent(Progress):
    """The same without a word, in all processes except the main one."""

    def _is_due(self) -> bool:
        return False

    def _show(self) -> None:
        pass


class _Bar(Progress):
    """The same as a progress bar on a terminal, by rich."""

    def __init__(self, total: int, description: str, done: int, console: Any) -> None:
        require("rich")
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(total, description, done)
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
        )
        self._task = self._rich.add_task(description, total=total, completed=self.done, metrics="")
        self._rich.start()

    def skip(self, steps: int) -> None:
        super().skip(steps)
        self._rich.reset(self._task, completed=self.done)

    def close(self) -> None:
        super().close()
        self._rich.stop()

    def _is_due(self) -> bool:
        return time.monotonic() - self._shown_at >= REFRESH

    def _show(self) -> None:
        self._rich.update(self._task, completed=self.done, metrics=_read(self._metrics))


@contextmanager
def progress(total: int, description: str, done: int = 0) -> Iterator[Progress]:
    """Show the progress of a block, which calls `update` on the object that it gets.

    Args:
        total: number of steps, ≥ 1; the count never passes it.
        description: what is going on, in a word or two.
        done: steps that were made before; they are left out of the estimate of the time that is left.
    """
    console = _terminal()
    if not is_main():
        shown: Progress = _Silent(total, description, done)
    else:
        shown = Progress(total, description, done) if console is None else _Bar(total, description, done, console)
    try:
        yield shown
    finally:
        shown.close()


def _terminal() -> Any:
    """The console of rich, where standard error is a terminal and rich is installed; None where plain lines must do."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal else None


def _read(metrics: Mapping[str, Any]) -> str:
    return "  ".join(v if isinstance(v, str) else f"{name} {float(v):.4g}" for name, v in metrics.items())
