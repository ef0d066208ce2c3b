"""Every command that trains, in real processes: ended at any moment, or met by a fault, it continues to the same end."""

import os
import signal

import pytest

from tests.helpers import survival, tiny, toy_model
from tests.helpers.survival import LINES, STATUS, Lab

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")
SIGNALS = ("SIGTERM", "SIGKILL", "SIGINT")
STORAGE = ("full", "readonly", "vanish")
MEMORY = ("memory", "torch memory")
STAGES = 6  # of a run, at which it is ended


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A lab whose process has imported little."""
    root = tmp_path_factory.mktemp("small")
    survival.prepare(root)
    lab = Lab(root)
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    survival.prepare(root)
    toy_model.folder(root / "tiny", tiny.scheduler())
    lab = Lab(root, survival.HEAVY)
    yield lab
    lab.close()


def test_a_run_that_every_signal_and_fault_has_ended_is_the_run_that_none_has(small):
    """One of each kind, in one run; the last ones where it is judged, exported and drawn."""
    stops = [
        ("SIGKILL", "open checkpoint"),
        ("SIGTERM", "step"),
        ("network nan", "step"),
        ("network error", "step"),
        ("gradient inf", "step"),
        ("memory", "step"),
        ("full", "open metrics"),
        ("vanish", "open metrics"),
        ("SIGINT", "progress of annealing"),
        ("readonly", "open model"),
        ("full", "open figures"),
    ]
    assert small.endure("ebm", stops, "ebm") == len(stops)


def test_a_folder_in_use_is_refused_until_its_process_has_ended(small):
    """A second run and a second resume, beside a run and a resume that are alive."""
    run, resume = small.words("ebm", "used"), ["resume", "used"]
    for words in (run, resume):
        first = small.start(words, does="SIGSTOP", at=1, of="step")
        small.wait_for_stop(first)
        for second in (run, resume):
            refused = small.run(second)
            assert refused.status == 2 and "is in use by another run" in refused.line
        os.kill(first[0], signal.SIGKILL)
        assert small.end(first).status == STATUS["SIGKILL"]
    assert small.endure("ebm", [], "used") == 0


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(len(SIGNALS)))
@pytest.mark.parametrize("name", LINES)
def test_a_run_that_is_ended_at_every_stage(name, turn, lab):
    """In three turns by every signal at each: at the start, planning, training, saving, judging, exporting, drawing."""
    moments = lab.spread(name, STAGES, shift=turn / len(SIGNALS))
    stops = [(SIGNALS[(i + turn) % len(SIGNALS)], moment) for i, moment in enumerate(moments)]
    assert lab.endure(name, stops, f"{name}-{turn}") >= 3
