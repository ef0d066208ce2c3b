"""A run holds no more at its end than at its middle: those of benchmarks/endurance.py, shorter, in this process."""

import importlib
from pathlib import Path

import pytest

UPDATES, READINGS = 400, 40
STEPS = UPDATES / 2  # between the middles of the quarters that are compared
LONGER = {  # what fills at first fills more slowly there
    "ebm": 3,  # caches of torch: fewer than 0.3 pieces per update after 800 updates
    "single, on a terminal": 10,  # the recent steps from which a bar tells its speed, those of half a minute at most
}
RUNS = ["finetune", "ebm", "queue", "queue, truncated at random", "nested"]
RUNS += ["single", "single, weighted", "single, on a terminal"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_users_run")]


@pytest.fixture(scope="module")
def endurance():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("endurance")


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_holds_does_not_grow(name, endurance):
    times = LONGER.get(name, 1)
    growth, steps = endurance.measure(name, times * UPDATES, READINGS)["growth"], times * STEPS
    assert growth["descriptors"] == growth["threads"] == growth["files"] == 0
    assert growth["objects"] < 0.1 * steps and growth["tensors"] < 0.1 * steps
    assert growth["blocks"] < steps  # caches of Python and torch fill at first: less than one piece per update
    assert growth["rss"] < 20e6


def test_every_run_is_tried_here_or_takes_a_compiler(endurance):
    assert {*RUNS, "single, compiled"} == endurance.RUNS.keys()


def test_one_number_kept_per_update_is_seen(endurance, monkeypatch):
    kept = []
    monkeypatch.setattr(endurance, "right", lambda x: kept.append(x.sum()) or x[:, 0].tanh())
    growth = endurance.measure("single", UPDATES, READINGS)["growth"]
    assert growth["tensors"] >= STEPS and growth["objects"] > 0.1 * STEPS and growth["blocks"] > STEPS
