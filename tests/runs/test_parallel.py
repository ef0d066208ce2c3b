"""Several processes make the same decisions, one of them writes and speaks, and they end together."""

import signal
import time
from datetime import datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from implicit_diffusion import processes
from implicit_diffusion.commands.reporting import command as reporting
from implicit_diffusion.commands.shared import opening
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.processes.group import control
from implicit_diffusion.runs import parallel
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.runs.parallel import End, concluded, speaks
from implicit_diffusion.runs.signals import exit_status
from implicit_diffusion.samplers import ULA
from tests.helpers.launched import launched
from tests.helpers.together import together

HERE = "tests.runs.test_parallel"
UPDATES = 6


def loop():
    potential = GaussianMixture(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    potential.means.requires_grad_(False)
    particles = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sgd = torch.optim.SGD([potential.logits], lr=0.5)
    return Single(potential, ULA(0.1), Reward(lambda x: x[:, 0]), sgd, particles=particles, noise=Noise(1))


def numbers(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunDirectory(folder).read_metrics()]


def stopped_by_one(folder):
    """A run that a signal to the last process stops in update 3: updates, reason, exit status."""

    def callback(run):
        if run.updates == 3 and processes.rank() == processes.world_size() - 1:
            signal.raise_signal(signal.SIGTERM)

    run = fit(loop(), UPDATES, callbacks=[callback], directory=folder)
    return run.updates, run.stopped, exit_status()


def resumed(folder):
    run = fit(loop(), UPDATES, directory=folder)
    return run.updates, run.stopped


def test_a_signal_to_one_stops_all_after_the_same_update_and_any_number_continue(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    fit(loop(), UPDATES, directory=whole)
    assert together(2, f"{HERE}:stopped_by_one", str(half)) == [(3, "interrupted", 143)] * 2
    assert RunDirectory(half).checkpoints.numbers()[0] == len(numbers(half)) == 3
    assert together(3, f"{HERE}:resumed", str(half)) == [(UPDATES, None)] * 3
    for row, exact in zip(numbers(half), numbers(whole), strict=True):
        assert row == pytest.approx(exact, rel=1e-12)
    one, other = (tree_leaves(RunDirectory(run).read_checkpoint().state["loop"]) for run in (half, whole))
    for left, right in zip(one, other, strict=True):
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def stopped_by_clocks(first):
    """Runs whose callback stops them by the clock of each process, which differ; `first` is the fastest."""

    def callback(run):
        return "time is up" if run.updates >= (2 if processes.rank() == first else 4) else None

    run = fit(loop(), UPDATES, callbacks=[callback])
    return run.updates, run.stopped


def test_the_clock_of_the_main_process_decides_when_to_stop():
    for first, updates in ((0, 2), (1, 4)):
        assert together(2, f"{HERE}:stopped_by_clocks", first, timeout=20) == [(updates, "time is up")] * 2


def dated_by_clocks():
    """The folder of a new run, where the processes have different clocks."""
    with patch.object(opening, "datetime") as clock:
        clock.now.return_value = datetime(2020 + processes.rank(), 1, 1)
        return str(opening.dated("finetune"))


def test_all_processes_have_one_folder():
    assert together(2, f"{HERE}:dated_by_clocks") == ["runs/finetune-20200101T000000"] * 2


def report_by_main(folder):
    """A report that the main process writes; the others read nothing."""
    with patch.object(reporting, "_read", wraps=reporting._read) as read:
        with pytest.raises(InvalidInputError, match="no run has begun in it"):
            reporting.run(reporting.Report((Path(folder),)))
        return read.called


def test_the_main_process_alone_reports(tmp_path):
    assert together(2, f"{HERE}:report_by_main", str(tmp_path)) == [True, False]


def slow_main(folder):
    """A run whose main process judges and saves for longer than the group of the tensors waits."""
    rank, size = processes.rank(), processes.world_size()
    dist.destroy_process_group()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=0.8))

    def judge(run):
        if run.updates == 2 and processes.is_main():
            time.sleep(1.5)

    run = fit(loop(), 3, callbacks=[judge])
    return run.updates, processes.from_main(lambda: time.sleep(1.0))


def test_a_slow_main_process_does_not_time_the_others_out(tmp_path):
    assert together(2, f"{HERE}:slow_main", str(tmp_path)) == [(3, None)] * 2


LOST = End(2, "error: another has ended; continue with X", lost=True)
STOPPED, TOLD = End(143, "interrupted; continue with X"), End(130, "interrupted; continue with X")
RAISED, FINE = End(2, "error: the reward raised"), End()
KILLED = (
    "error: another has ended; continue with X. No word came from process 1 of 2: it was killed, or does not answer"
)
BY_ONE = "Process 1 of 2 has ended with this: the reward raised"


@pytest.mark.parametrize(
    ("ends", "status", "text"),
    [
        ({0: FINE, 1: FINE}, 0, ""),
        ({0: RAISED, 1: RAISED}, 2, RAISED.message),
        ({0: RAISED}, 2, RAISED.message),
        ({0: LOST, 1: RAISED}, 2, f"{LOST.message}. {BY_ONE}"),
        ({0: LOST, 1: STOPPED}, 143, STOPPED.message),
        ({0: LOST}, 2, KILLED),
        ({0: TOLD, 1: STOPPED}, 143, STOPPED.message),
        ({0: TOLD, 1: TOLD}, 130, TOLD.message),
        ({0: STOPPED, 1: RAISED}, 2, f"{STOPPED.message}. {BY_ONE}"),
    ],
)
def test_what_the_main_process_says(ends, status, text):
    assert concluded(0, 2, ends) == (status, text)


@pytest.mark.parametrize(
    ("own", "ends", "expected"),
    [
        (0, {0: RAISED, 1: RAISED}, True),
        (1, {0: RAISED, 1: RAISED}, False),
        (1, {1: RAISED}, False),  # the main process waits for it, and will say so
        (1, {1: LOST, 2: LOST}, True),
        (2, {1: LOST, 2: LOST}, False),
        (1, {0: FINE, 1: RAISED}, True),
        (0, {0: FINE, 1: FINE}, False),
    ],
)
def test_one_process_speaks(own, ends, expected):
    assert speaks(own, ends) is expected


def joined_while_the_main_process_connects(folder):
    """Whether the main process was connected when this one was told that the group is there."""
    number, count = processes.rank(), processes.world_size()
    dist.destroy_process_group()
    ready = Path(folder, "ready")

    def slow_control():
        group = control()
        if number == 0:
            time.sleep(0.5)
            ready.touch()
        return group

    meeting = iter([(dist.FileStore(f"{folder}/store", count), number, count)])
    with (
        patch.object(parallel, "rendezvous", return_value=meeting),
        patch.object(parallel, "control", slow_control),
        patch.object(parallel, "deaf"),
    ):
        parallel._join()
    return ready.exists()


def test_no_process_can_end_before_all_are_connected(tmp_path):
    assert together(2, f"{HERE}:joined_while_the_main_process_connects", str(tmp_path)) == [True] * 2


def test_an_error_of_all_is_printed_once(tmp_path):
    with launched(2, ["recovery", "--particles", "21", "--out", str(tmp_path / "run")], tmp_path / "said") as run:
        pass
    assert run.status == [2, 2]
    said = "error: --particles must be a multiple of the number of processes, 2, got 21; use 20 or 22\n"
    assert (run.stdout, run.stderr) == (["", ""], [said, ""])
    assert not (tmp_path / "run").exists()
