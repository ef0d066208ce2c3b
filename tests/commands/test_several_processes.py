"""Whole commands in several processes: the numbers of one, one voice, and one end."""

import json
import os
import signal
import subprocess
import sys

import pytest

from implicit_diffusion import cli
from implicit_diffusion.commands.reporting import command as reporting
from implicit_diffusion.runs.directory import RunDirectory
from tests.helpers.launched import launched
from tests.helpers.together import together

pytestmark = pytest.mark.slow
FINETUNE = ["finetune", "--num-steps", "3", "--batch", "6", "--updates", "4", "--starts", "8", "--kl-weight", "2.5"]
EBM = ["ebm", "--steps", "4", "--particles", "24", "--width", "4", "--judge-steps", "4"]
COMMANDS = {
    "finetune": FINETUNE,
    "nested": [*FINETUNE, "--loop", "nested", "--lora-rank", "2"],
    "ebm": [*EBM, "--refresh", "2"],
    "ebm after scores": [*EBM, "--start-by", "score-matching", "--start-steps", "3"],
    "pretrain": ["pretrain", "--steps", "3", "--batch", "6", "--channels", "8", "8", "--samples", "8", "--chains", "2"],
    "compare": [
        *("compare", "--problems", "gaussian", "--methods", "adjoint-queue", "score", "surrogate", "grpo", "best-of"),
        *("--num-steps", "2", "--depth", "2", "--batch", "8", "--batches", "2", "--updates", "16", "--points", "1"),
        *("--held-out", "8", "--widest", "3", "--seeds", "1"),
    ],
    "recovery": ["recovery", "--steps", "500", "--particles", "6", "--seeds", "1"],
    "theory": ["theory", "--parts", "rates", "lag", "--steps", "100", "--copies", "2", "--particles", "8"],
}
DIFFERENT = ("seconds", "out", "predicted_memory_bytes")  # by run, or by the number of processes
REWARD = """
import os
calls = []

def f(x):
    calls.append(len(x))
    if len(calls) > 40 and os.environ.get("RANK") == "1":
        raise ValueError("not on Tuesdays")
    return x.flatten(1).mean(1)
"""


def command(words, folder):
    assert cli.main([*words, "--out", str(folder)]) == 0
    return folder


def content(value):
    """All numbers of a JSON value by their places, except times and paths."""
    if isinstance(value, dict):
        return {f"{k}.{place}": v for k in value if k not in DIFFERENT for place, v in content(value[k]).items()}
    if isinstance(value, list):
        return {f"{i}.{place}": v for i, item in enumerate(value) for place, v in content(item).items()}
    return {"": value}


def agree(one, other, rel=1e-3):
    """Summary and metrics of two runs are the same up to rounding, which a training in single precision spreads."""
    for read in (
        lambda run: content(json.loads((run / "summary.json").read_text())),
        lambda run: content(RunDirectory(run).read_metrics()),
    ):
        left, right = read(one), read(other)
        assert left.keys() == right.keys()
        for place, value in left.items():
            assert right[place] == (pytest.approx(value, rel=rel, abs=1e-4) if isinstance(value, float) else value), (
                place
            )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gives_the_numbers_of_one_process(name, tmp_path):
    one, several = command(COMMANDS[name], tmp_path / "one"), tmp_path / "several"
    with launched(3 if name == "finetune" else 2, [*COMMANDS[name], "--out", str(several)], tmp_path / "said") as run:
        pass
    assert set(run.status) == {0}, run.stderr
    assert run.stdout[0]
    assert set(run.stdout[1:]) == set(run.stderr[1:]) == {""}
    agree(one, several)
    files = ({file.relative_to(folder) for file in folder.rglob("*")} for folder in (one, several))
    assert next(files) == next(files)


def interrupted(folder, said, end, patch=None):
    """A run of two processes that ends in the midst of its training; `end` does something to it once it has begun."""
    words = [*EBM, "--steps", "100000", "--out", str(folder)]
    with launched(2, words, said, patch=patch) as run:
        run.wait_for((folder / "metrics.jsonl").exists, "the first updates")
        end(run)
    assert run.seconds < 30
    assert all("Traceback" not in text for text in run.stderr)
    assert not list(folder.rglob("*.tmp"))
    return run


def resumes(folder):
    """The checkpoint is whole: the run continues in one process, to its next interruption."""
    number = RunDirectory(folder).read_checkpoint(say=pytest.fail).number
    rows = [row["updates"] for row in RunDirectory(folder).read_metrics()]
    assert rows == list(range(1, rows[-1] + 1))
    assert rows[-1] >= number


@pytest.mark.parametrize("lost", [0, 1])
def test_one_that_is_killed_ends_all(lost, tmp_path):
    run = interrupted(tmp_path / "run", tmp_path / "said", lambda run: run.signal(lost, signal.SIGKILL))
    assert run.status == ([-9, 2] if lost == 0 else [2, -9])
    (said,) = [line for line in run.stderr[1 - lost].splitlines() if line.startswith("error:")]
    assert "another process of this run has ended" in said
    assert f"`implicit-diffusion resume {tmp_path / 'run'}` continues the run" in said
    assert f"No word came from process {lost} of 2" in said
    assert "error" not in run.stderr[lost]
    resumes(tmp_path / "run")


def test_a_signal_to_one_stops_all_with_its_status(tmp_path):
    run = interrupted(tmp_path / "run", tmp_path / "said", lambda run: run.signal(1, signal.SIGTERM))
    assert run.status == [143, 143]
    assert run.stderr[0].count(f"continue with `implicit-diffusion resume {tmp_path / 'run'}`") == 1
    assert run.stderr[1] == ""
    resumes(tmp_path / "run")
    assert (
        RunDirectory(tmp_path / "run").read_checkpoint().number
        == RunDirectory(tmp_path / "run").read_metrics()[-1]["updates"]
    )


def test_what_one_process_alone_raises_is_said_once(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    words = [*FINETUNE, "--updates", "1000", "--reward", f"{tmp_path}/mine.py:f", "--out", str(tmp_path / "run")]
    with launched(2, words, tmp_path / "said") as run:
        pass
    assert run.status == [2, 2]
    assert run.seconds < 30
    (said,) = [line for line in run.stderr[0].splitlines() if line.startswith("error:")]
    assert "not on Tuesdays" in said
    assert "resume" in said
    assert run.stderr[1] == ""


def test_a_folder_that_another_run_holds_is_refused(tmp_path):
    words = ["recovery", "--particles", "6", "--out", str(tmp_path / "run")]
    with RunDirectory(tmp_path / "run").held(), launched(2, words, tmp_path / "said") as run:
        pass
    assert run.status == [2, 2]
    assert run.stderr[0].count("is in use by another run") == 1
    assert run.stderr[1] == ""


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers_start_a_run_of_two(launcher, tmp_path):
    if "accelerate" in launcher[0]:
        launcher = [*launcher, "--dynamo_backend", "no", "--multi_gpu", "--main_process_port", "0"]
    words = [*launcher, "-m", "implicit_diffusion", *EBM, "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out") == 1
    agree(command(EBM, tmp_path / "one"), tmp_path / "run")


def reported(folder):
    """The pages that this process writes of an unfinished run."""
    pages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "write_so_far", lambda run, page: pages.append(page.name))
        reporting.run(reporting.Report((folder,)))
    return pages


def test_a_page_of_progress_is_written_once(tmp_path):
    RunDirectory.create(tmp_path / "run").write_config({}, "recovery")
    assert together(2, "tests.commands.test_several_processes:reported", tmp_path / "run") == [["so-far.html"], []]
