"""A fine-tuning run on a disk that refuses one kind of file, or damages one: one line, and the same run after it."""

import errno
import io
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest
from diffusers import DDPMScheduler

from implicit_diffusion.cli import main
from implicit_diffusion.commands.shared.drawing import finish_figure, sheet
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.models.pretrained import save_pipeline
from implicit_diffusion.runs import RunDirectory
from tests.commands.finetune.test_kills import call as call
from tests.commands.finetune.test_kills import finish, same
from tests.commands.finetune.test_kills import whole as whole
from tests.files.test_manifest import flip
from tests.helpers import tiny
from tests.helpers.faults import FREE, Operations, in_child, refuse_from, vanish_at

FULL, READ_ONLY = (errno.ENOSPC, FREE), (errno.EROFS, ())


def draw(directory):
    figure = sheet(1.0, 1.0)
    figure.subplots()
    finish_figure(figure, directory.figure("training"))


def export(directory):
    with writing(directory.model):
        save_pipeline(directory.model, DiffusersDenoiser(tiny.unet(**tiny.PLAIN)), DDPMScheduler(), "a card")


@pytest.mark.parametrize("fault", [FULL, READ_ONLY], ids=["full", "read-only"])
@pytest.mark.parametrize(("job", "names"), [(draw, "figures/training.png"), (export, "model")])
def test_figures_and_exports_that_cannot_be_written(job, names, fault, tmp_path):
    directory = RunDirectory.create(tmp_path / "run")
    directory.write_config({"lr": 1.0}, "finetune")
    directory.checkpoints.save(7, {"k": 1})

    def ends():
        Operations(directory.path, refuse_from(1, *fault))
        with directory.resumable():
            job(directory)

    status, says = in_child(ends)
    assert status == 1, says
    assert says.startswith(f"StorageError: {directory.path}/{names} cannot be written ({os.strerror(fault[0])})")
    assert f"; the last good state is in {directory.checkpoint}/000007; then {directory.resume_command}" in says
    assert not [*directory.path.rglob("*.tmp")] or fault is READ_ONLY
    job(directory)


def ended(arguments, out, before):
    """Status and last line of a command in a process of its own whose disk has a fault."""

    def job():
        Operations(out, before)
        with redirect_stderr(io.StringIO()) as errors, redirect_stdout(io.StringIO()):
            status = main(arguments)
        return f"{status}\n{errors.getvalue()}"

    ended, says = in_child(job)
    assert ended == 0, says
    status, *lines = says.splitlines()
    return int(status), lines[-1]


PLACES = [
    "/provenance.json",
    "/checkpoint/000000",
    "/checkpoint/000002",
    "/metrics.jsonl",
    "/judged/manifest.json",
    "/model/unet",
    "/model/chain.json",
    "/summary.json",
    "/figures/training",
    "/report.html",
]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "fault"), [*((w, FULL) for w in PLACES), ("/model/unet", READ_ONLY)])
def test_a_kind_of_file_that_cannot_be_written(where, fault, call, whole, tmp_path, capsys):
    """Also where a library of others writes it; the line says what remains and how to continue."""
    out = tmp_path / "run"
    code, allowed = fault
    status, line = ended([*call, "--out", str(out)], out, refuse_from(0, code, allowed, where))
    assert status == 2 and line.startswith(f"error: {out}/"), line
    assert f"cannot be written ({os.strerror(code)})" in line
    named = line.split(" cannot be written")[0]
    assert where in f"{named}/" or where.startswith(named.removeprefix(f"error: {out}")), line
    directory = RunDirectory(out)
    if directory.has_state:
        number, _ = directory.read_checkpoint(pytest.fail)
        assert f"the last good state is in {directory.checkpoints.path(number)}; then" in line
    if (out / "config.json").exists():
        assert line.endswith(f"then `implicit-diffusion resume {out}` continues the run")
    finish(call, out, capsys)
    same(out, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [60, 180])
def test_a_folder_that_vanishes_during_a_run(number, call, tmp_path):
    out = tmp_path / "run"
    status, line = ended([*call, "--out", str(out)], out, vanish_at(number, out))
    assert status == 2 and line.startswith(f"error: {out}"), line
    assert any(words in line for words in ("No such file or directory", "does not exist", "is gone")), line
    assert "resume" not in line and not (out / "summary.json").exists() and not (out / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        (
            "plan/state.safetensors",
            "plan      drawn again, not reused from {out}/plan: {out}/plan/state.safetensors is",
        ),
        ("judged/before/manifest.json", "judging   done again, not continued from {out}/judged/before: "),
        ("checkpoint/000002/state.safetensors", "passed over: {out}/checkpoint/000002/state.safetensors is damaged"),
    ],
)
def test_a_flipped_bit_in_what_a_resumed_run_trusts(damaged, says, call, whole, tmp_path, capsys):
    """It is noticed and said, and what it belongs to is made again, as it was."""
    out = tmp_path / "run"
    assert ended([*call, "--out", str(out)], out, refuse_from(0, *FULL, "/judged/after"))[0] == 2
    flip(out / damaged, -30, 1)
    assert main(["resume", str(out)]) == 0
    captured = capsys.readouterr()
    assert says.format(out=out) in captured.out + captured.err
    same(out, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_report_is_not_made_from_a_damaged_judgement(name, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    flip(out / "judged" / name, -30, 1)
    assert main(["report", str(out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{out}/judged/{name} is damaged" in line and f"remove {out}/summary.json" in line, line
    (out / "summary.json").unlink()
    assert main(["resume", str(out)]) == 0
    same(out, whole[0])
