"""Every command that trains, in real processes: ended at any moment, or met by a fault, it comes to the same end."""

import os
import signal

import pytest

from implicit_diffusion.cli import TRACEBACK, main
from implicit_diffusion.commands.recovery import command as recovery
from tests.helpers import survival, tiny, toy_model
from tests.helpers.survival import LINES, STATUS, Lab

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked")
SIGNALS = ("SIGTERM", "SIGKILL", "SIGINT")
ANYWHERE = ("full", "memory", "readonly", "error", "vanish", "torch memory")  # faults that any moment may bring
IN_A_STEP = ("network nan", "network inf", "network error", "gradient nan", "gradient inf")
IN_A_REWARD = ("nan", "inf", "error")
PARTS = ("planning", "training", "held-out checks", "judging")  # where its values count
STAGES = 6  # of a run, at which it is ended
VARIANTS = ("nested", "lora", "adapt", "kept", "plan")  # of fine-tuning, which is tried in full
CASES = [(name, turn) for name in LINES for turn in range(3) if name not in VARIANTS or turn == len(name) % 3]


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


FEW = [("SIGTERM", "step"), ("network nan", "step"), ("SIGKILL", "progress of annealing"), ("full", "open figures")]
MORE = [
    ("SIGTERM", "step"),
    ("network nan", "step"),
    ("network error", "step"),
    ("memory", "step"),
    ("vanish", "open metrics"),
    ("SIGKILL", "progress of annealing"),
    ("readonly", "open model"),
    ("SIGINT", "open summary"),
    ("full", "open figures"),
]


@pytest.mark.parametrize(
    "stops", [pytest.param(FEW, id="few"), pytest.param(MORE, id="one of each kind", marks=pytest.mark.slow)]
)
def test_a_run_that_signals_and_faults_have_ended_is_the_run_that_none_has(stops, small):
    """In one run; the last ones where it is judged, exported and drawn."""
    assert small.endure("ebm", stops, f"ebm-{len(stops)}") == []


def test_a_folder_in_use_is_refused_until_its_process_has_ended(small):
    """A second run beside one that is alive, and a second resume beside a resume."""
    for words in (small.words("ebm", "used"), ["resume", "used"]):
        first = small.start(words, does="SIGSTOP", at=1, of="step")
        small.wait_for_stop(first)
        refused = small.run(words)
        assert refused.status == 2 and "is in use by another run" in refused.line
        os.kill(first[0], signal.SIGKILL)
        assert small.end(first).status == STATUS["SIGKILL"]
    ended = small.run(["resume", "used"])
    assert ended.status == 0 and small.different("ebm", "used") == []


def test_an_error_that_nobody_expected_is_one_line_unless_its_traceback_is_asked_for(tmp_path, monkeypatch, capsys):
    """It names what was raised, where, and what continues the run."""
    monkeypatch.setattr(recovery, "Study", lambda directory, keep: {}["colour"])
    call = ["recovery", "--steps", "500", "--out", str(tmp_path / "run")]
    monkeypatch.delenv(TRACEBACK, raising=False)
    assert main(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: KeyError: 'colour' ({__file__}, line ") and f"{TRACEBACK}=1" in line
    assert line.endswith(f"once its cause is mended, `implicit-diffusion resume {tmp_path / 'run'}` continues the run")
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(KeyError, match="colour"):
        main(["resume", str(tmp_path / "run")])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "turn"), CASES)
def test_a_run_that_is_ended_at_every_stage(name, turn, lab):
    """In three turns by every signal at each: at the start, planning, training, saving, judging, exporting, drawing."""
    moments = lab.spread(name, STAGES, shift=turn / len(SIGNALS))
    stops = [(SIGNALS[(i + turn) % len(SIGNALS)], moment) for i, moment in enumerate(moments)]
    assert lab.endure(name, stops, f"{name}-{turn}") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LINES if name not in VARIANTS])
def test_a_run_that_every_fault_has_met(name, lab):
    """Each fault once or more: in the rewards of every part, in network or potential, gradient, memory and files."""
    _, moments = lab.reference(name)
    rewards = [m for m in moments if m.startswith("reward") and m.endswith(PARTS)]
    stops = [(does, moment) for moment in rewards for does in IN_A_REWARD]
    if name != "compare":  # where a training that overflows is a result
        stops += [(does, "step") for does in IN_A_STEP]
    stops += [(ANYWHERE[i % len(ANYWHERE)], moment) for i, moment in enumerate(lab.spread(name, 2 * len(ANYWHERE)))]
    stops.sort(key=lambda stop: next(i for i, moment in enumerate(moments) if stop[1] in moment))
    passed = lab.endure(name, stops, f"{name}-faults")
    assert [stop for stop in passed if stop[0] not in ("full", "readonly", "vanish")] == []  # nothing more was written
