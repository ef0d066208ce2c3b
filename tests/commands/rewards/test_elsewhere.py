"""`finetune --reward-python`: the numbers of this process, an end that can be resumed, and pythons that are not run."""

import json
import os
import re
import shutil
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file

from implicit_diffusion import load_reward
from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from implicit_diffusion.commands.rewards import elsewhere
from implicit_diffusion.commands.rewards import trust as reward_trust
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.scorers import closing
from tests.helpers import tiny, toy_model
from tests.helpers.stops import interrupt_at

TINY = ["--num-steps", "3", "--batch", "2", "--updates", "4", "--starts", "4", "--kl-weight", "2.5", "--lr", "1e-6"]
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
REWARD = """
import os
from pathlib import Path
import numpy as np
from beside_the_reward import scale

if os.getpid() == {here}:
    print("executed in the run")

def dark(images: np.ndarray):
    if Path(__file__).with_name("die").exists():
        print("out of memory")
        os._exit(1)
    return (scale * (1 - images.mean((1, 2, 3)))).round(2)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model and a reward; a run with the reward in this process; and its command line."""
    home = tmp_path_factory.mktemp("home")
    model = toy_model.folder(home / "tiny", tiny.scheduler())
    (home / "beside_the_reward.py").write_text("scale = 100.0")
    (home / "my.py").write_text(REWARD.format(here=os.getpid()))
    call = ["finetune", "--model", str(model), "--reward", f"{home}/my.py:dark", *TINY, "--out"]
    assert main([*call, str(home / "here")]) == 0
    return home, call


def results(run):
    summary = json.loads((run / "summary.json").read_text()) | {"seconds": 0}
    lines = [line | {"seconds": 0} for line in RunDirectory(run).read_metrics()]
    return summary, lines, {name: value.tolist() for name, value in load_file(run / WEIGHTS).items()}


def children():
    return {child.pid for child in psutil.Process().children()}


@pytest.mark.slow
def test_a_scorer_that_dies_stops_the_run_which_resumes_bit_for_bit(home, tmp_path, monkeypatch, capfd):
    """It is the run whose reward is computed in this process, and which nothing stops."""
    home, call = home
    run, original, before = tmp_path / "run", training.callbacks, children()

    def dying(state):
        if state.updates == 2:
            (home / "die").touch()

    try:
        with monkeypatch.context() as patched:
            patched.setattr(training, "callbacks", lambda *arguments: [*original(*arguments), dying])
            assert main([*call, str(run), "--reward-python", sys.executable]) == 2
    finally:
        (home / "die").unlink(missing_ok=True)
    out, err = capfd.readouterr()
    assert "executed in the run" not in out and children() == before
    assert out.count("its process ended with status 1; it printed last: out of memory; started again") == 2
    assert re.search(r"after update 3: .*my\.py:dark: its process ended with status 1; .*out of memory .*resume", err)
    config = json.loads((run / "config.json").read_text())
    assert config["reward_python"] == sys.executable
    recorded = json.loads((run / "provenance.json").read_text())["inputs"]
    assert recorded["reward python"]["version"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}, numpy ")
    assert [*recorded["reward imports"]["files"]] == [str(home / "beside_the_reward.py")]
    assert main(["resume", str(run)]) == 0
    assert results(run) == results(home / "here") and children() == before


@pytest.fixture(scope="module")
def half(home):
    """A run with --reward-python that was interrupted in its first update."""
    home, call = home
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(1)])
        assert main([*call, str(home / "half"), "--reward-python", sys.executable]) == 130
    return home / "half"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def renamed(run, python):
    """The run, as if it had been begun with another python."""
    for name in ("config.json", "provenance.json"):
        text = (run / name).read_text()
        assert json.dumps(sys.executable) in text
        (run / name).write_text(text.replace(json.dumps(sys.executable), json.dumps(str(python))))


def test_a_folder_cannot_name_a_program_that_then_runs(half, tmp_path, capsys):
    run = shutil.copytree(half, tmp_path / "run")
    inside = script(run / "python", f"touch {tmp_path}/harm")
    outside = script(tmp_path / "other", f"touch {tmp_path}/harm")
    python = sys.executable
    for program, why in ((inside, f"{inside} lies inside the run directory"), (outside, "you have not named it on")):
        shutil.copy(half / "config.json", run), shutil.copy(half / "provenance.json", run)
        renamed(run, program)
        assert main(["resume", str(run)]) == 2
        message = capsys.readouterr().err
        assert why in message and f"run by {program}" in message and "--trust-reward" in message
    assert not (tmp_path / "harm").exists() and python == sys.executable


def test_another_version_of_the_python_is_a_change(half, tmp_path, capsys):
    run = shutil.copytree(half, tmp_path / "run")
    recorded = json.loads((run / "provenance.json").read_text())
    recorded["inputs"]["reward python"]["version"] = "3.1, numpy 0.1"
    (run / "provenance.json").write_text(json.dumps(recorded))
    assert main(["resume", str(run)]) == 2
    message = capsys.readouterr().err
    assert "reward python was 3.1, numpy 0.1 and is 3." in message and "--accept-changes reward" in message


def test_by_name_and_without_running_the_file_here(home, tmp_path):
    home, _ = home
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    (tmp_path / "own.py").write_text("import numpy as np\ndef f(x: np.ndarray, k=1): return k * x[:, 0, 0, 0]\n")
    with closing():
        there = load_reward(f"{tmp_path}/own.py:f(k=3)", python=sys.executable)
        assert torch.equal(there(x), load_reward(f"{tmp_path}/own.py:f(k=3)")(x))
        assert load_reward("brightness", python=sys.executable)(x).shape == (3,)
    with pytest.raises(
        InvalidInputError, match=r"`reward_python` runs a file, .*write one that imports package\.module"
    ):
        load_reward("package.module:f", python=sys.executable)
    named = reward_trust.code_of(f"{home}/my.py:dark", home / "python")
    assert named.place != reward_trust.code_of(f"{home}/my.py:dark").place


OPTIONS = {
    r"--reward-python computes rewards of your own, .* and --reward brightness is not one": [],
    r"--reward-timeout must be positive": ["--reward", "my.py:dark", "--reward-timeout", "0"],
    r"--reward-python: there is no program .*/nowhere": ["--reward", "my.py:dark", "--reward-python", "nowhere"],
}


@pytest.mark.parametrize("message", OPTIONS)
def test_bad_options_leave_no_folder(message, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(elsewhere, "Scorer", lambda *arguments, **options: pytest.fail("a process was started"))
    monkeypatch.chdir(home[0])
    call = ["finetune", "--out", str(tmp_path / "run"), "--reward-python", sys.executable]
    assert main([*call, *OPTIONS[message]]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()
