import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch

from implicit_diffusion.runs import console, progress
from implicit_diffusion.runs.console import never_failing_output


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_line_every_tenth(clock, capsys):
    with progress(200, "fine-tuning") as bar:
        for k in range(200):
            clock[0] += 0.1
            bar.update({"reward": torch.tensor(1.23456), "path_kl": k / 100})
    shown = lines(capsys)
    assert len(shown) == 10
    assert shown[0] == "fine-tuning  20/200 (10 %)  2 s, 18 s left  reward 1.235  path_kl 0.19"
    assert shown[-1] == "fine-tuning  200/200 (100 %)  20 s  reward 1.235  path_kl 1.99"


def test_a_line_every_fifteen_seconds_where_steps_are_slow(clock, capsys):
    with progress(1000, "slow") as bar:
        for _ in range(30):
            clock[0] += 4
            bar.update()
    times = [(k, 4 * k, 4 * (1000 - k)) for k in (4, 8, 12, 16, 20, 24, 28, 30)]
    assert lines(capsys) == [f"slow  {k}/1000 ({k // 10} %)  {spent} s, {left} s left" for k, spent, left in times]


def test_what_was_made_before_says_nothing_of_how_long_the_rest_takes(clock, capsys):
    with progress(100, "run", 80) as bar:
        for _ in range(10):
            clock[0] += 3
            bar.update()
    assert lines(capsys) == ["run  85/100 (85 %)  15 s, 45 s left", "run  90/100 (90 %)  30 s, 30 s left"]


def test_what_turns_out_to_be_made_already_says_nothing_either(clock, capsys):
    with progress(100, "run") as bar:
        bar.skip(60)
        for _ in range(10):
            clock[0] += 3
            bar.update()
    assert lines(capsys) == [
        "run  60/100 (60 %)  0 s",
        "run  65/100 (65 %)  15 s, 105 s left",
        "run  70/100 (70 %)  30 s, 90 s left",
    ]


def test_no_more_than_all_is_done(clock, capsys):
    with progress(4, "run", 1) as bar:
        bar.update(advance=9)
        bar.update()
    with progress(4, "again", 7) as bar:
        bar.update()
    assert lines(capsys) == ["run  4/4 (100 %)  0 s"]


def test_words_are_shown_as_they_are_and_without_a_step(clock, capsys):
    with progress(4, "run") as bar:
        clock[0] += 20
        bar.update({"reward": 2.0, "phase": "filling"}, advance=0)
    assert lines(capsys) == ["run  0/4 (0 %)  20 s  reward 2  filling"]


def test_the_last_word_of_a_run_that_breaks_off(clock, capsys):
    with pytest.raises(RuntimeError), progress(100, "run") as bar:
        bar.update({"kl": 0.5}, advance=3)
        raise RuntimeError
    assert lines(capsys) == ["run  3/100 (3 %)  0 s, 0 s left  kl 0.5"]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(3, "fine-tuning") as bar:
        bar.skip(1)
        for k in range(1, 3):
            bar.update({"reward": k})
    out, err = capsys.readouterr()
    assert out == ""
    assert "fine-tuning" in err
    assert "3/3" in err
    assert "reward 2" in err
    assert "\x1b[" in err


def test_metrics_are_read_only_when_shown(clock, capsys):
    class Costly:
        reads = 0

        def __float__(self):
            Costly.reads += 1
            return 1.0

    with progress(1000, "run") as bar:
        for _ in range(1000):
            bar.update({"reward": Costly()})
    assert Costly.reads == len(lines(capsys)) == 10


@pytest.fixture
def closed():
    """A stream whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", buffering=1, encoding="ascii")  # noqa: SIM115
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_nobody_reading_is_no_reason_to_stop(name, closed, monkeypatch):
    monkeypatch.setattr(sys, name, closed)
    with never_failing_output():
        for _ in range(3):
            print("a line", file=getattr(sys, name))
            print("x" * 100_000, file=getattr(sys, name), flush=True)
        with progress(3, "run") as bar:
            bar.update(advance=3)
    assert getattr(sys, name) is closed
    closed.flush()  # as the interpreter does at its end


def test_letters_that_a_stream_lacks_are_spelled_out(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with never_failing_output():
            print("β = 2")
    assert (tmp_path / "out").read_text() == "\\u03b2 = 2\n"


def test_a_stream_that_was_closed_before_it_all_began(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", None)
    with never_failing_output():
        print("a line", file=sys.stderr, flush=True)
        with progress(3, "run") as bar:
            bar.update(advance=3)
    assert sys.stderr is None and capfd.readouterr().out == ""


def test_other_faults_of_printing_are_not_hidden(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise ValueError("no such letter")

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(ValueError, match="no such letter"), never_failing_output():
        print("a line")


@pytest.mark.parametrize(
    "words",
    [
        "finetune --help | head -n 1",
        pytest.param("--help | true", marks=pytest.mark.slow),
        pytest.param("hexagon --seeds 0 2>&1 | true", marks=pytest.mark.slow),
    ],
)
def test_a_closed_pipe_after_the_command_line(words):
    """In a shell, as people type it; the first command's status is that of a pipe that was read."""
    command, pipe = words.split("|")
    line = f"set -o pipefail; {sys.executable} -m implicit_diffusion {command} | {pipe}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == (2 if "seeds" in words else 0)
