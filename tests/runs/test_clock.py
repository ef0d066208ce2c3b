"""Seconds by parts: they add up to all of the time, over interruptions and runs within runs."""

import json
import re

import pytest

from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.clock import part


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves by hand."""
    time = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: time[0])
    return time


def test_a_part_within_another_takes_over(now, tmp_path):
    with clock.run() as spent:
        now[0] += 1
        with part("training"):
            now[0] += 2
            with part("saving"):
                now[0] += 4
            now[0] += 8
        with part("saving"):
            now[0] += 16
        now[0] += 32
    assert spent.seconds == {"the rest": 33.0, "training": 10.0, "saving": 20.0}
    assert sum(spent.seconds.values()) == now[0] - 100.0


def test_pieces_of_an_interrupted_run_add_up(now, tmp_path):
    """However a piece ends; a function may be a part."""

    @part("training")
    def train():
        now[0] += 3
        raise KeyboardInterrupt

    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), clock.run():
            clock.keep(tmp_path)
            now[0] += 1
            train()
    now[0] += 1000  # between the pieces
    with clock.run():
        clock.keep(tmp_path)
        with part("drawing"):
            now[0] += 5
            assert clock.seconds(tmp_path) == {"the rest": 2.0, "training": 6.0, "drawing": 5.0}
    assert clock.seconds(tmp_path) == json.loads((tmp_path / clock.SECONDS_FILE).read_text())
    assert sum(clock.seconds(tmp_path).values()) == 13.0


def test_what_is_killed_has_kept_its_longer_parts(now, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with clock.run():
        clock.keep(tmp_path)
        for _ in range(10):
            with part("training"):
                now[0] += 1
        assert 5 <= clock.read(tmp_path)["training"] <= 10


def test_a_run_within_a_run_counts_in_both(now, tmp_path):
    with clock.run() as outer:
        with part("planning"):
            now[0] += 1
        for _ in range(2):
            with clock.run() as inner, part("training"):
                now[0] += 3
            assert inner.seconds["training"] == 3.0 and sum(inner.seconds.values()) == 3.0
        now[0] += 1
    assert outer.seconds["training"] == 6.0 and sum(outer.seconds.values()) == now[0] - 100.0


def test_a_command_counts_from_its_beginning_and_only_its_own_run(now):
    clock.begin_command()
    now[0] += 7
    for loading in (7.0, None):
        with clock.run() as spent:
            now[0] += 1
        assert spent.seconds.get("loading") == loading and sum(spent.seconds.values()) == 1 + (loading or 0)


def test_a_run_that_is_refused_leaves_nothing_and_one_that_ended_early_may_begin_anew(now, tmp_path):
    with RunDirectory(tmp_path / "run").held(), clock.run():
        clock.keep(tmp_path / "run")
        now[0] += 10
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / clock.SECONDS_FILE).write_text("{}")
    RunDirectory.check(tmp_path / "run")


@pytest.mark.parametrize("damage", ["", "[1]", "nonsense", '{"training": "long"}', '{"training": null}'])
def test_a_damaged_file_is_no_reason_to_stop(now, tmp_path, damage):
    (tmp_path / clock.SECONDS_FILE).write_text(damage)
    assert clock.seconds(tmp_path) == {}
    with clock.run():
        clock.keep(tmp_path)


def test_outside_a_run_nothing_is_counted(now):
    with part("training"):
        now[0] += 1
    with clock.run() as spent:
        pass
    assert sum(spent.seconds.values()) == 0.0


def test_shares_of_all(now, tmp_path):
    assert clock.shares(tmp_path) == []
    (tmp_path / clock.SECONDS_FILE).write_text('{"training": 3.0, "judging": 9.0}')
    assert clock.shares(tmp_path) == [("judging", 9.0, 0.75), ("training", 3.0, 0.25), ("all", 12.0, 1.0)]


@pytest.mark.parametrize("seconds", [[0.6, 0.6, 0.6], [0.5, 0.5], [7.5, 2.5, 0.5, 0.1], [1.9] * 9, [0.99, 3.49, 2.49]])
def test_parts_in_words_add_up_to_all(seconds):
    """In whole seconds, each within one of what it took."""
    text = clock.in_words({f"part {place}": s for place, s in enumerate(seconds)})
    whole, *shown = (int(n) for n in re.findall(r"(?:^|[:,] )(-?\d+)", text))
    assert whole == sum(shown) == round(sum(seconds)) and min(shown) > 0
    for place, s in re.findall(r"(\d+) part (\d+)", text):
        assert abs(int(place) - seconds[int(s)]) < 1


def test_how_it_is_told():
    spent = {"the rest": 0.4, "training": 10.4, "loading": 12.4, "saving": 0.4, "judging": 0.5}
    assert clock.in_words(spent) == "24 s: 12 loading, 10 training, 1 judging, 1 the rest"
    spent = {"training": 2.9, "judging": 1.7, "drawing": 1.6}  # each rounded by itself adds up to 7 of 6 seconds
    assert clock.in_words(spent) == "6 s: 3 training, 2 judging, 1 drawing"
    assert clock.in_words({"training": 4.4}) == "4 s: 4 training" and clock.in_words({}) == "0 s"
