"""Stopping on SIGINT, SIGTERM or SIGHUP: at the end of a step inside a loop, at once elsewhere.

A signal that was ignored when the program began, as SIGHUP is under nohup and SIGINT in the background of a script,
stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from implicit_diffusion.processes import highest, is_main

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Handler = Callable[[int, FrameType | None], None]


@dataclass
class Stop:
    """Whether a signal has asked the run to stop."""

    requested: bool = False
    heard: bool = False  # by this process

    def agree(self, *decisions: bool) -> list[bool]:
        """Let a signal to one of several processes stop all of them; a call that waits for all of them.

        Args:
            decisions: of this process; those by a clock may differ from process to process.

        Returns:
            The decisions of the main process.
        """
        main = is_main()
        number, *decided = highest(_last.number if self.requested else 0, *(int(main and each) for each in decisions))
        if number:
            self.requested, _last.number = True, number
        return [bool(each) for each in decided]


@dataclass
class _Last:
    number: int = signal.SIGINT


_last = _Last()  # the signal that stopped the program, for its exit status


@contextmanager
def graceful() -> Iterator[Stop]:
    """Turn the first signal inside the block into `stop.requested`, the second into KeyboardInterrupt.

    A loop reads `stop.requested` between two steps, writes its checkpoint and ends. After the block, the previous
    handlers are in place again. Outside of the main thread, where Python allows no handlers, this does nothing.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        _last.number = number
        if stop.heard:
            raise KeyboardInterrupt
        stop.requested = stop.heard = True

    with _handling(handle):
        yield stop


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn every signal inside the block into KeyboardInterrupt, as Python does with SIGINT; `graceful` precedes it."""

    def handle(number: int, frame: FrameType | None) -> None:
        _last.number = number
        raise KeyboardInterrupt

    _last.number = signal.SIGINT
    with _handling(handle):
        yield


def deaf(*, for_good: bool = False) -> None:
    """Drop all signals from here on; where it is not for good, `graceful` and `interruptible` hear them again."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # which Python keeps while it ends
                signal.signal(number, signal.SIG_IGN if for_good else lambda number, frame: None)


def exit_status() -> int:
    """Exit status of a program that a signal stopped: 130, 143 or 129, by the last signal that came."""
    return 128 + _last.number


@contextmanager
def _handling(handle: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None: the handler was not set from Python, and cannot be put back from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
