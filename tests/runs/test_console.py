import pytest
import torch

from implicit_diffusion.runs import console, progress


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
    assert shown[0] == "fine-tuning  20/200 (10 %)  2 s  reward 1.235  path_kl 0.19"
    assert shown[-1] == "fine-tuning  200/200 (100 %)  20 s  reward 1.235  path_kl 1.99"


def test_a_line_every_fifteen_seconds_where_steps_are_slow(clock, capsys):
    with progress(1000, "slow") as bar:
        for _ in range(30):
            clock[0] += 4
            bar.update()
    assert lines(capsys) == [f"slow  {k}/1000 ({k // 10} %)  {4 * k} s" for k in (4, 8, 12, 16, 20, 24, 28, 30)]


def test_the_last_word_of_a_run_that_breaks_off(clock, capsys):
    with pytest.raises(RuntimeError), progress(100, "run") as bar:
        bar.update({"kl": 0.5}, advance=3)
        raise RuntimeError
    assert lines(capsys) == ["run  3/100 (3 %)  0 s  kl 0.5"]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(3, "fine-tuning") as bar:
        for k in range(3):
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
