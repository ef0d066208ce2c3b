import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import implicit_diffusion
from implicit_diffusion.__main__ import main as program
from implicit_diffusion.cli import main
from implicit_diffusion.commands.hexagon import command as hexagon
from implicit_diffusion.runs import graceful
from implicit_diffusion.runs.signals import SIGNALS, exit_status, interruptible


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_insists(number):
    with graceful() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_every_signal_ends_a_command_at_once_in_one_line_and_its_own_status(
    number, status, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(hexagon, "Arms", lambda config: signal.raise_signal(number))
    before = [signal.getsignal(each) for each in SIGNALS]
    assert main(["hexagon", "--out", str(tmp_path / "run")]) == status
    again = f"interrupted; continue with `implicit-diffusion resume {tmp_path / 'run'}`\n"
    assert capsys.readouterr().err == again
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_loop_that_left_by_a_signal_tells_the_status():
    with interruptible():
        assert exit_status() == 130
        with graceful() as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested and exit_status() == 143


@pytest.mark.parametrize("context", [graceful, interruptible])
@pytest.mark.parametrize("number", SIGNALS)
def test_what_was_ignored_stays_ignored(number, context):
    """SIGHUP under nohup, SIGINT of a script's background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with context() as stop:
            signal.raise_signal(number)
            assert signal.getsignal(number) is signal.SIG_IGN
        assert stop is None or not stop.requested
    finally:
        signal.signal(number, before)


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


def test_an_interrupt_while_the_program_is_imported_is_one_line(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, *arguments):
            if name == "implicit_diffusion.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "implicit_diffusion.cli", raising=False)
    monkeypatch.delattr(implicit_diffusion, "cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert program() == 130
    assert capsys.readouterr().err == "interrupted\n"
