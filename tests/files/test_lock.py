"""One holder of a run directory at a time, by a lock that ends with its process."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from implicit_diffusion.cli import main
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import fit
from tests.runs.test_fit import build

HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/.lock")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds a run directory with a config in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("theirs")
    call = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


COMMANDS = {
    "finetune": ["--num-steps", "2"],
    "finetune --plan": ["--num-steps", "2"],
    "sweep": ["--kl-weights", "2"],
    "ebm": ["--data", "moons"],
    "ebm --compare": ["--data", "moons"],
    "hexagon": [],
    "recovery": [],
    "theory": [],
    "pretrain": [],
    "tilt": ["--model", "nowhere"],
    "resume": None,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_writes_is_refused_before_it_does(command, holder, tmp_path, capsys):
    run, options = tmp_path / "run", COMMANDS[command]
    words = [str(run)] if options is None else [*options, "--out", str(run)]
    assert main([*command.split(), *words]) == 2
    name = "PATH" if options is None else "--out"
    assert f"{name} {run} is in use by another run" in capsys.readouterr().err
    assert (run / "config.json").read_text() == "theirs"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.json"]


def test_the_lock_ends_with_its_process(holder, tmp_path):
    with pytest.raises(InvalidInputError, match="in use by another run; wait"), RunDirectory(tmp_path / "run").held():
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunDirectory(tmp_path / "run").held() as directory:
        directory.write_config({})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_fit_holds_its_directory_and_the_same_thread_may_hold_it_twice(tmp_path):
    directory, refused = RunDirectory(tmp_path / "run"), []

    def intrude():
        try:
            fit(build()[0], 1, directory=directory)
        except InvalidInputError as error:
            refused.append(str(error))

    def look(state):
        if state.updates == 1:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    with directory.held():
        fit(build()[0], 2, directory=directory, callbacks=[look])
        assert (directory.path / ".lock").exists()
    assert len(refused) == 1 and "is in use" in refused[0]
    assert not (directory.path / ".lock").exists() and len(directory.read_metrics()) == 2


def test_a_folder_that_was_made_for_nothing_is_taken_away_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "mine"):
        with pytest.raises(ZeroDivisionError), RunDirectory(path).held():
            assert path.is_dir()
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_wherever_the_block_goes_the_lock_is_that_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with RunDirectory(Path("run")).held():
        os.chdir("elsewhere")
    assert [path.name for path in tmp_path.rglob("*")] == ["elsewhere"]


@pytest.mark.skipif(os.name != "posix", reason="names elsewhere are Unicode")
def test_a_name_that_is_not_utf_8_is_refused_in_one_line(tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9")
    with pytest.raises(InvalidInputError, match="not UTF-8; name another"), RunDirectory(tmp_path / odd).held():
        pass
    assert main(["finetune", "--out", str(tmp_path / odd)]) == 2 == main(["ebm", "--data", odd])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("is not UTF-8" in line for line in lines) and not any(tmp_path.iterdir())
    with pytest.raises(InvalidInputError, match=r"model is 'caf\\udce9', which is not UTF-8"):
        RunDirectory.create(tmp_path / "run").write_config({"model": odd})


def test_several_processes_of_one_program_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["recovery", "--out", str(tmp_path / "run")]) == 2
    assert "one of 2 processes (WORLD_SIZE" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with RunDirectory(tmp_path / "run").held():
        pass


def test_weights_after_a_held_run_are_those_of_any(tmp_path):
    loops = [build()[0] for _ in range(2)]
    fit(loops[0], 3), fit(loops[1], 3, directory=RunDirectory(tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(*(loop.model.parameters() for loop in loops), strict=True))
