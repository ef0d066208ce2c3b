"""A fine-tuning run that ends at any moment, by a kill or a full disk: the same command, or `resume`, ends it well."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import command as finetune
from implicit_diffusion.commands.finetune import judging
from implicit_diffusion.files import atomic as files
from implicit_diffusion.runs import RunDirectory
from tests.helpers.toy_model import folder

TINY = ["--num-steps", "2", "--batch", "2", "--updates", "2", "--starts", "4", "--lr", "1e-3", "--kl-weight", "2.5"]
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


class Kill(BaseException):
    """The end of the process, as far as it can be had without ending it."""


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    model = folder(tmp_path_factory.mktemp("models") / "model", DDPMScheduler(clip_sample=False))
    return ["finetune", "--model", model, *TINY]


@pytest.fixture(scope="module")
def whole(call, tmp_path_factory):
    """A run that nothing ended, and the files that it wrote in one step, up to the report."""
    out, writes = tmp_path_factory.mktemp("runs") / "run", []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "replace", lambda path, to: writes.append(to.name) or os.replace(path, to))
        assert main([*call, "--out", str(out)]) == 0
    return out, writes[: writes.index("report.html") + 1]


def same(out, whole):
    """Equal but for seconds and names of folders."""
    assert all(torch.equal(x, load_file(out / WEIGHTS)[name]) for name, x in load_file(whole / WEIGHTS).items())
    for name in ("summary.json", "plan.json"):
        ours, theirs = (json.loads((run / name).read_text()) | {"seconds": 0} for run in (out, whole))
        assert ours == theirs
    ours, theirs = ([m | {"seconds": 0} for m in RunDirectory(run).read_metrics()] for run in (out, whole))
    assert ours == theirs
    figures = [sorted(path.name for path in (run / "figures").iterdir()) for run in (out, whole)]
    assert figures[0] == figures[1] and (out / "report.html").stat().st_size > 10_000
    assert not list(out.rglob("*.tmp")) and not (out / ".lock").exists()


def finish(call, out, capsys):
    """The same command; where that is refused, what its message advises."""
    capsys.readouterr()
    if main([*call, "--out", str(out)]) != 0:
        advice = f"continue with `implicit-diffusion resume {out}`"
        assert advice in capsys.readouterr().err
        assert main(["resume", str(out)]) == 0


def end_at(patched, moment, error):
    """Raise before the file of that number gets its name, or after; what is half-written stays, as after a kill."""
    number, when = moment
    count = iter(range(10**6))

    def replace(path, to):
        now = next(count) == number
        if now and when == "before":
            raise error
        os.replace(path, to)
        if now:
            raise error

    patched.setattr(Path, "replace", replace)
    patched.setattr(Path, "unlink", lambda path, missing_ok=False: None)


def check(call, whole, moment, out, monkeypatch, capsys):
    with monkeypatch.context() as patched, pytest.raises(Kill):
        end_at(patched, moment, Kill())
        main([*call, "--out", str(out)])
    finish(call, out, capsys)
    same(out, whole[0])


def test_the_files_of_a_run_in_their_order(whole):
    """What is asked, rewards, plan, what is resolved, first state; last state, what is judged, summary; the report.

    A state is there with its manifest; its own file gets its name after that.
    """
    names = [name for name in whole[1] if not name.endswith((".png", ".safetensors")) and name != "seconds.json"]
    expected = ["config.json", "manifest.json", "plan.json", "config.json", "manifest.json"]
    assert [name for name in names if name != "provenance.json"][:5] == expected
    assert names[-4:] == ["manifest.json", "manifest.json", "summary.json", "report.html"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_kill_beside_the_marks_of_a_run(name, call, whole, tmp_path, monkeypatch, capsys):
    """Before config.json is there the run begins anew; after summary.json only what is derived is made."""
    moment = whole[1].index(name), "before" if name == "config.json" else "after"
    check(call, whole, moment, tmp_path / "run", monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_every_write(when, call, whole, tmp_path, monkeypatch, capsys):
    for number, name in enumerate(whole[1][:-1]):
        check(call, whole, (number, when), tmp_path / f"{number}-{name}", monkeypatch, capsys)


@pytest.mark.slow
def test_a_process_that_ends_on_the_spot(call, whole, tmp_path, capsys):
    """`os._exit` at the first checkpoint, in the middle of the export, and within a figure."""
    program = """
import os, sys
from pathlib import Path
from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import export, judging
from implicit_diffusion.commands.finetune.report import figures
from implicit_diffusion.files import checkpoints
end = lambda *arguments, **options: os._exit(9)
first = checkpoints, "save_state_there"
where = {"first": first, "export": (export, "write_chain"), "figure": (figures, "save")}[sys.argv[1]]
setattr(*where, end)
main(sys.argv[2:])
"""
    for moment in ("first", "export", "figure"):
        out = tmp_path / moment
        ended = subprocess.run([sys.executable, "-c", program, moment, *call, "--out", str(out)], capture_output=True)
        assert ended.returncode == 9
        finish(call, out, capsys)
        same(out, whole[0])


def test_a_report_is_made_again_as_it_was(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    before = {path: path.read_bytes() for path in [*out.glob("figures/*.png"), out / "report.html"]}
    shutil.rmtree(out / "figures")
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert "report    " in capsys.readouterr().out
    for path, data in before.items():
        if path.name != "plan.png":  # which belongs to the plan
            assert path.name == "report.html" or path.read_bytes() == data
    assert len((out / "report.html").read_bytes()) == pytest.approx(len(before[out / "report.html"]), abs=2000)
    assert main(["resume", str(out)]) == 2
    assert "it is finished" in capsys.readouterr().err


def test_what_is_no_run_has_no_report(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2 == main(["report", str(tmp_path / "nowhere")])
    said = capsys.readouterr().err.splitlines()
    assert "does not say which command" in said[0] and "there is no run" in said[1]


FULL = OSError(28, "No space left on device")


@pytest.mark.slow
def test_a_full_disk_is_one_line_that_names_the_file_and_what_goes_on(call, whole, tmp_path, monkeypatch, capsys):
    """At the first checkpoint; what is there then is gone on with."""
    out, number = tmp_path / "run", [n for n, name in enumerate(whole[1]) if name == "manifest.json"][1]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", Full(number))
        assert main([*call, "--out", str(out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{out}/checkpoint/000000.tmp/manifest.json cannot be written (No space left on device)" in line
    assert f"then `implicit-diffusion resume {out}` continues the run" in line
    assert main(["resume", str(out)]) == 0
    same(out, whole[0])


class Full:
    """A disk that is full when the file of that number gets its name."""

    def __init__(self, number):
        self.left = number

    def __get__(self, path, kind=None):
        return lambda to: self(path, to)

    def __call__(self, path, to):
        self.left -= 1
        if self.left == -1:
            self.refused = path
            raise FULL
        os.replace(path, to)


@pytest.mark.slow
def test_a_full_disk_at_every_write(call, whole, tmp_path, monkeypatch, capsys):
    for number in range(len(whole[1])):
        out, full = tmp_path / f"{number}", Full(number)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", full)
            assert main([*call, "--out", str(out)]) == 2
        name = full.refused.name.removesuffix(".tmp")
        assert f"{name} cannot be written (No space left on device)" in capsys.readouterr().err.splitlines()[-1]
        finish(call, out, capsys)
        same(out, whole[0])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of a process are POSIX")
def test_a_limit_on_the_size_of_files(tmp_path):
    """The system's own refusal, in another process: the state before stays, and nothing half-written is left."""
    program = """
import resource, sys, torch
from implicit_diffusion.errors import StorageError
from implicit_diffusion.runs import RunDirectory
run = RunDirectory.create(sys.argv[1])
run.checkpoints.save(1, {"k": 1})
run.write_summary({"k": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda: run.checkpoints.save(2, torch.ones(10_000)), lambda: run.write_summary({"k": 9999 * "x"}),
              lambda: run.append_metrics({"k": 9999 * "x"})):
    try:
        write()
    except StorageError as error:
        print(error)
assert run.read_checkpoint() == (1, {"k": 1}) and run.read_metrics() == []
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["checkpoint/000002.tmp/state.safetensors", "summary.json", "metrics.jsonl"]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(f"/{name} cannot be written (" in line for name, line in zip(names, lines))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_vanishes_is_named(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    shutil.rmtree(run.path)
    for write in (lambda: run.append_metrics({"k": 1}), lambda: run.write_summary({}), lambda: run.figure("x")):
        with pytest.raises(files.StorageError, match=r"cannot be written .No such file.*check that the folder exists"):
            write()


REWARD = """
import sys
calls = 0
def r(x):
    global calls
    calls += 1
    if calls == {at}:
        {does}
    return x.flatten(1).mean(1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "says"), [("sys.exit(0)", "SystemExit: 0"), ("raise KeyError('colour')", "KeyError: 'colour'")]
)
def test_a_reward_that_ends_in_the_middle_of_a_run(does, says, call, tmp_path, monkeypatch, capsys):
    """One line that names it, where and after which update; mended, the run continues from there."""
    out, file = tmp_path / "run", tmp_path / "mine.py"
    file.write_text(REWARD.format(at=10**6, does=does))
    options = [*call, "--reward", f"{file}:r", "--out", str(out)]
    original = finetune.train

    def train(*arguments):
        module = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(file))
        module.calls = 10**6 - 2
        return original(*arguments)

    monkeypatch.setattr(finetune, "train", train)
    assert main(options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: after update ") and f"--reward {file}:8: {says}" in line
    assert line.endswith(f"then `implicit-diffusion resume {out}` continues the run")
    if "exit" in does:
        monkeypatch.setattr(finetune, "train", original)
        assert main(["resume", str(out)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
def test_memory_that_is_used_up_is_one_line(error, call, tmp_path, monkeypatch, capsys):
    def judge(*arguments):
        raise error

    monkeypatch.setattr(judging, "evaluate_all", judge)
    assert main([*call, "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: memory is used up (") and f"resume {tmp_path / 'run'}` continues the run" in line
