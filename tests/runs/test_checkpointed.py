"""Runs that are continued from their checkpoints, of which some are damaged or another run's, or end on a bad disk."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.manifest import MANIFEST
from implicit_diffusion.files.states import STATE_FILE
from implicit_diffusion.loops import Nested
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import fit
from tests.files.test_manifest import flip
from tests.helpers.faults import FREE, Operations, in_child, refuse_from, vanish_at
from tests.runs.test_fit import build, weights


def pause(at):
    return lambda f: "pause" if f.updates == at else None


def rows(directory):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in directory.read_metrics()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing ended, and one that paused after update 9, with its three newest checkpoints."""
    place = tmp_path_factory.mktemp("runs")
    loop, _ = build()
    fit(loop, 12, directory=place / "whole")
    RunDirectory.create(place / "begun").write_config({"lr": 1.0}, "finetune")
    fit(build()[0], 12, callbacks=[pause(9)], directory=place / "begun", checkpoint_every=0.0, keep=3)
    return place, weights(loop), rows(RunDirectory(place / "whole"))


@pytest.fixture
def begun(whole, tmp_path):
    shutil.copytree(whole[0] / "begun", tmp_path / "begun")
    return RunDirectory(tmp_path / "begun")


def continued(directory, whole):
    loop, _ = build()
    fit(loop, 12, directory=directory)
    assert torch.equal(weights(loop), whole[1]) and rows(directory) == whole[2]
    assert [directory.checkpoints.numbers()[0], len(directory.checkpoints.numbers())] == [12, 2]


def test_as_many_checkpoints_stay_as_were_asked_for(begun, whole):
    assert begun.checkpoints.numbers() == [9, 8, 7]
    continued(begun, whole)


@pytest.mark.parametrize("place", [4, 100, -1])
@pytest.mark.parametrize("name", [STATE_FILE, MANIFEST])
def test_a_run_continues_from_the_newest_checkpoint_that_is_whole(name, place, begun, whole, capsys):
    flip(begun.checkpoints.path(9) / name, place, 2)
    continued(begun, whole)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert str(begun.checkpoints.path(9) / name) in said and said.endswith("; continued from update 8")


def test_all_may_be_damaged_but_one(begun, whole, capsys):
    (begun.checkpoints.path(9) / STATE_FILE).unlink()
    (begun.checkpoints.path(8) / STATE_FILE).write_bytes(b"")
    continued(begun, whole)
    assert capsys.readouterr().err.count("; continued from update 7") == 2


def test_without_a_whole_checkpoint_a_run_fails_and_leaves_all_as_it_was(begun):
    for number in begun.checkpoints.numbers():
        flip(begun.checkpoints.path(number) / STATE_FILE, -1, 0)
    before = {path: path.read_bytes() for path in begun.path.rglob("*") if path.is_file()}
    with pytest.raises(
        InvalidInputError, match=r"no state in .* can be continued from: .*000009.*; .*000008.*; .*000007"
    ):
        fit(build()[0], 12, directory=begun)
    assert {path: path.read_bytes() for path in begun.path.rglob("*") if path.is_file()} == before


def test_the_checkpoint_of_another_run_is_passed_over(begun, whole, tmp_path, capsys):
    """Also one of the same options, which began at another time."""
    other = RunDirectory.create(tmp_path / "other")
    other.write_config({"lr": 1.0}, "finetune")
    fit(build(lr=0.5)[0], 11, directory=other)
    shutil.copytree(other.checkpoints.path(11), begun.checkpoints.path(11))
    continued(begun, whole)
    assert "000011 is a state of something else: its begun is" in capsys.readouterr().err


def test_a_run_that_was_moved_is_the_same_run(begun, whole, tmp_path, capsys):
    begun.path.rename(tmp_path / "elsewhere")
    continued(RunDirectory(tmp_path / "elsewhere"), whole)
    assert "passed over" not in capsys.readouterr().err


@pytest.mark.parametrize("state", [{"study": {}}, {"loop": {"iteration": 3}}, {"loop": 3}, [], 7])
def test_a_state_that_does_not_fit_the_loop_is_refused(state, begun):
    begun.checkpoints.save(10, state)
    with pytest.raises(InvalidInputError, match="000010 does not fit this run: "):
        fit(build()[0], 12, directory=begun)


def test_the_state_of_another_kind_of_loop_is_refused(begun):
    chain, objective = build()[0].chain, build()[0].objective
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=0.02)
    with pytest.raises(InvalidInputError, match="state is that of another loop: loop was Queue, is Nested"):
        fit(Nested(chain, objective, adam, batch=16, noise=Noise(0)), 12, directory=begun)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_number_of_checkpoints_that_is_none(keep, tmp_path):
    with pytest.raises(InvalidInputError, match="keep must be an integer ≥ 1"):
        fit(build()[0], 3, directory=tmp_path, keep=keep)


FAULTS = {
    "full": (errno.ENOSPC, FREE, "checkpoint"),
    "full of metrics": (errno.ENOSPC, FREE, "metrics.jsonl"),
    "read-only": (errno.EROFS, (), ""),
}


def end(directory, before):
    """Train to update 12 on a disk with a fault; how the process ended, and what it said."""

    def job():
        Operations(directory.path, before)
        with directory.resumable():
            fit(build()[0], 12, directory=directory, checkpoint_every=0.0)

    return in_child(job)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_on_a_disk_that_refuses_ends_in_one_line_and_can_be_continued(kind, begun, whole):
    """The message names the file, the last good state, and the command that continues the run."""
    code, allowed, where = FAULTS[kind]
    status, says = end(begun, refuse_from(40 if kind != "full of metrics" else 0, code, allowed, where))
    number = begun.checkpoints.numbers()[0]
    assert status == 1 and says.startswith(f"StorageError: {begun.path}/") and f"({os.strerror(code)})" in says, says
    assert where in says.split(" cannot be written")[0]
    assert f"; the last good state is in {begun.checkpoints.path(number)}; then {begun.resume_command}" in says
    assert begun.read_checkpoint(pytest.fail).number == number >= 9
    continued(begun, whole)


def test_a_run_whose_folder_vanishes_ends_in_one_line(begun):
    status, says = end(begun, vanish_at(60, begun.path))
    assert status == 1 and says.startswith(f"StorageError: {begun.path}/") and "No such file or directory" in says
    assert not list(begun.path.rglob("*.safetensors"))


def test_half_a_line_of_metrics_is_taken_back(tmp_path):
    """On a disk that takes only the beginning of what is written, as a full one does."""
    directory = RunDirectory.create(tmp_path / "run")
    directory.append_metrics({"updates": 1})

    def job():
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
        try:
            directory.append_metrics({"updates": 2, "word": 100 * "x"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    status, says = in_child(job)
    assert status == 1
    assert says.startswith(f"StorageError: {directory.path / 'metrics.jsonl'} cannot be written (File too large)")
    assert (directory.path / "metrics.jsonl").read_text() == '{"updates": 1}\n'


SMALL = """
import sys, torch
from pathlib import Path
from implicit_diffusion.errors import StorageError
from implicit_diffusion.runs import RunDirectory
run = RunDirectory.create(Path(sys.argv[1]) / "run")
run.write_config({"lr": 1.0}, "finetune")
saved = 0
try:
    with run.resumable():
        for k in range(1, 9):
            run.append_metrics({"updates": k})
            run.checkpoints.save(k, {"k": k, "x": torch.full((k * 20_000,), float(k))}, keep=2)
            saved = k
except StorageError as error:
    print(error)
number, state = run.read_checkpoint()
assert number == saved == state["k"] > 1 and state["x"].eq(number).all() and not list(run.path.rglob("*.tmp"))
run.checkpoints.save(9, {"k": 9}, keep=1)  # there is room for less
print(run.checkpoints.numbers())
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A file system of a megabyte, in a name space of its own: the system itself refuses, also safetensors' writer."""
    mounted = 'mount -t tmpfs -o size=1m none "$0" && exec "$1" -c "$2" "$0"'
    command = ["unshare", "-rm", "sh", "-c", mounted, str(tmp_path), sys.executable, SMALL]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command[:4], 'mount -t tmpfs none "$0"', tmp_path]).returncode
    ):
        pytest.skip("no name spaces of users here")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error, numbers = done.stdout.splitlines()
    assert "cannot be written (" in error and "No space left on device" in error and numbers == "[9]"
    assert error.endswith("continues the run") and "; the last good state is in " in error
