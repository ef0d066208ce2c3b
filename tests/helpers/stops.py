"""What ends a test's run, or its waiting, from inside the process."""

import signal
from contextlib import contextmanager


def interrupt_at(update):
    """A callback that sends the run SIGINT after that update."""
    return lambda fit: signal.raise_signal(signal.SIGINT) if fit.updates == update else None


@contextmanager
def limited(seconds):
    """A block that fails once it hangs; not by an `OSError`, which a command would turn into a refusal."""

    def ring(number, frame):
        raise AssertionError(f"still at work after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
