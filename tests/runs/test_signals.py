import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from implicit_diffusion.runs import graceful


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number):
    with graceful() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_handlers_are_back_afterwards_whatever_happens():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with graceful():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    with pytest.raises(RuntimeError), graceful():
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_off_the_main_thread_nothing_happens():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with graceful() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


LOOP = """
import time
from implicit_diffusion.runs import graceful
with graceful() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
print("checkpoint written", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals between processes are POSIX")
def test_a_process_finishes_its_step():
    with subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "checkpoint written\n"
    assert process.returncode == 0
