"""A plan is drawn once for its folder: reused where it holds, gone on with after an interrupt, else drawn again."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import planning
from implicit_diffusion.commands.sweep.folders import finished
from implicit_diffusion.evaluation import chains as evaluation
from implicit_diffusion.evaluation import stored
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.runs import RunDirectory
from tests.helpers.toy_model import folder

WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
PART = 2 * 16 * 3 * 8 * 8  # numbers in a part: two starts of the plan, four of the judgement
REWARD = """
import random
import numpy, torch
import scale_of_reward

def mine(x):
    factor = 4 * float(torch.rand(())) + numpy.random.rand() + random.random()  # two that are close are rare
    return scale_of_reward.scale * factor * x.flatten(1).mean(1)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Path(folder(tmp_path_factory.mktemp("models") / "model", DDPMScheduler(clip_sample=False)))


@pytest.fixture
def place(model, tmp_path, monkeypatch, as_users_run):
    """A model and a reward that draws at random, in parts of two starts: eight starts are four parts.

    The type checks of the tests draw from the generator of Python as well, to choose which item of a list to check.
    """
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "my.py").write_text(REWARD)
    (tmp_path / "scale_of_reward.py").write_text("scale = 2.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # which a reward's folder joins
    sys.modules.pop("scale_of_reward", None)
    monkeypatch.setattr(evaluation, "NUMBERS", PART)
    return tmp_path


def words(out, *more, command="finetune"):
    sizes = ["--num-steps", "2", "--batch", "2", "--updates", "1", "--starts", "8", "--lr", "1e-3"]
    return [command, *sizes, "--model", "model", "--reward", "my.py:mine", "--out", out, *more]


class Parts:
    """Counts the parts that are drawn, and ends the last one that may be."""

    def __init__(self, monkeypatch):
        self.original, self.drawn, self.left, self.error = evaluation._part, 0, 10**6, KeyboardInterrupt
        monkeypatch.setattr(evaluation, "_part", self)

    def __call__(self, *arguments, **options):
        if self.drawn == self.left:
            self.left = 10**6
            if self.error is signal.SIGTERM:
                signal.raise_signal(signal.SIGTERM)
            raise self.error
        self.drawn += 1
        return self.original(*arguments, **options)


@pytest.fixture
def parts(monkeypatch):
    return Parts(monkeypatch)


def rewards(out):
    return load_state(Path(out) / "plan")["reward"]


def same_run(ours, theirs):
    ours, theirs = Path(ours), Path(theirs)
    assert all(torch.equal(x, load_file(ours / WEIGHTS)[name]) for name, x in load_file(theirs / WEIGHTS).items())
    for name in ("summary.json", "plan.json"):
        first, second = (json.loads((run / name).read_text()) | {"seconds": 0} for run in (ours, theirs))
        assert first == second
    assert sorted(path.name for path in ours.rglob("*")) == sorted(path.name for path in theirs.rglob("*"))


@pytest.mark.slow
def test_a_run_in_the_folder_of_its_plan_draws_no_trajectory_of_it_again(place, parts, monkeypatch, capsys):
    """Though β, the rate and the loop are others than the plan's; the same run as without a plan."""
    assert main(words("run", "--plan", "--kl-weight", "3", "--lr", "1")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(planning, "draw", lambda *arguments: pytest.fail("drawn again"))
        capsys.readouterr()
        assert main(words("run", "--loop", "nested")) == 0
    said = capsys.readouterr().out
    assert f"plan      reused: {place}/run/plan holds the 128 trajectories of this model, chain and reward" in said
    assert "What the KL weight buys" in said
    assert main(words("alone", "--loop", "nested")) == 0
    (place / "run" / "figures" / "pretrained.png").unlink()
    same_run("run", "alone")


@pytest.mark.slow
def test_a_plan_asked_for_twice_is_drawn_once(place, parts, capsys):
    assert main(words("run", "--plan")) == 0
    drawn, picture = parts.drawn, (place / "run/figures/pretrained.png").read_bytes()
    (place / "run/figures/pretrained.png").unlink()
    assert main(words("run", "--plan", "--kl-weight", "3")) == 0
    assert parts.drawn == drawn and (place / "run/figures/pretrained.png").read_bytes() == picture
    assert 3 in [row["kl_weight"] for row in json.loads((place / "run/plan.json").read_text())["rows"]]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def shift(place):
    file = place / "model/unet/diffusion_pytorch_model.safetensors"
    from safetensors.torch import save_file

    save_file({name: x + 0.01 for name, x in load_file(file).items()}, file)


OTHERS = {
    "--num-steps was 2 and is 3": ["--num-steps", "3"],
    "--eta was not there and is 0.5; --scheduler was ddpm": ["--scheduler", "ddim", "--eta", "0.5"],
    "--seed was 0 and is 1": ["--seed", "1"],
    "--starts was 8 and is 10": ["--starts", "10"],
    "--reward was my.py:mine and is my.py:mine my.py:other": ["--reward", "my.py:other"],
    "reward my.py was sha256": lambda place: edit(place / "my.py", "4", "3"),
    "reward imports scale_of_reward.py was sha256": lambda place: edit(place / "scale_of_reward.py", "2.0", "3.25"),
    "model unet/diffusion_pytorch_model.safetensors was sha256": shift,
    "threads was 1 and is 2": lambda place: torch.set_num_threads(2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "difference",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith(("--", "threads", "reward imports")))
        for name in OTHERS
    ],
)
def test_what_a_plan_rests_on_is_compared_by_name(difference, place, capsys):
    """One line that names it, and the plan that a folder of its own would have had."""
    with (place / "my.py").open("a") as file:
        file.write("\ndef other(x): return -x.flatten(1).mean(1)\n")
    assert main(words("run", "--plan")) == 0
    change, options = OTHERS[difference], ()
    if isinstance(change, list):
        options = change
    else:
        change(place)
    sys.modules.pop("scale_of_reward", None)
    capsys.readouterr()
    try:
        assert main(words("run", "--plan", *options)) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "drawn again" in line]
        assert line.startswith(f"plan      drawn again, not reused from {place}/run/plan: {difference}")
        assert main(words("new", "--plan", *options)) == 0
    finally:
        torch.set_num_threads(1)
    assert torch.equal(rewards("run"), rewards("new"))


@pytest.mark.slow
def test_what_is_trained_and_how_has_no_part_in_a_plan(place, parts, capsys):
    """Neither adapters, which are off in the pretrained network, nor the place of model and reward."""
    assert main(words("run", "--plan")) == 0
    drawn = parts.drawn
    assert main(words("adapters", "--plan", "--lora-rank", "2", "--gradient-checkpointing", "--lr", "1")) == 0
    assert torch.equal(rewards("run"), rewards("adapters"))
    shutil.copytree(place / "model", place / "moved")
    assert main(words("run", "--plan", "--lora-rank", "2", "--model", "moved", "--batch", "4")) == 0
    assert parts.drawn == 2 * drawn


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "old"])
def test_a_plan_that_cannot_be_read_is_drawn_again(damage, place, parts, capsys):
    assert main(words("run", "--plan")) == 0
    file, before = place / "run/plan/state.safetensors", rewards("run")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        save_state(file.parent, {"reward": before})
    assert main(words("run", "--plan")) == 0
    says = {"cut": "is damaged", "old": "another release drew it"}
    assert says[damage] in capsys.readouterr().out
    assert torch.equal(rewards("run"), before)


@pytest.mark.parametrize(
    ("plan", "way"),
    [(True, "again"), *(pytest.param(each, "resume", marks=pytest.mark.slow) for each in (True, False))],
)
def test_an_interrupted_plan_goes_on_bit_for_bit(plan, way, place, parts, capsys):
    """After one of four parts; with a reward that draws from all global generators."""
    more = ["--plan"] if plan else []
    assert main(words("whole", *more)) == 0
    total, parts.drawn, parts.left = parts.drawn, 0, 1
    parts.error = signal.SIGTERM
    assert main(words("run", *more)) == 143
    assert capsys.readouterr().err.endswith(f"interrupted; continue with `implicit-diffusion resume {place}/run`\n")
    assert len(rewards("run")) == 2 and not (place / "run/plan.json").exists()
    assert main(["resume", "run"] if way == "resume" else words("run", *more)) == 0
    assert f"plan      continued: {place}/run/plan holds 32 of 128 trajectories" in capsys.readouterr().out
    assert torch.equal(rewards("run"), rewards("whole")) and parts.drawn == total
    if plan:
        name = "figures/pretrained.png"
        assert (place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()
        assert (place / "run/plan.json").read_text() == (place / "whole/plan.json").read_text()
    else:
        same_run("run", "whole")


@pytest.mark.slow
def test_a_killed_plan_has_what_was_written_now_and_then(place, parts, monkeypatch):
    """A kill leaves no time to write: what was written before it is gone on with."""
    monkeypatch.setattr(stored, "WRITE_EVERY", 0)
    monkeypatch.setattr(stored, "WRITING_SHARE", 1e9)
    assert main(words("whole", "--plan")) == 0
    total, parts.drawn, parts.left, parts.error = parts.drawn, 0, 3, Kill
    written, original = [], stored.Stored.write

    def write(self, evaluation, count):
        if len(written) < 2:  # the last one comes from the end, which a kill does not wait for
            written.append(count)
            original(self, evaluation, count)

    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(stored.Stored, "write", write)
        main(words("run", "--plan"))
    assert written == [1, 2] and len(rewards("run")) == 4
    assert main(words("run", "--plan")) == 0
    assert torch.equal(rewards("run"), rewards("whole")) and parts.drawn == 1 + total


class Kill(BaseException):
    """The end of the process, as far as it can be had without ending it."""


def test_resume_of_a_folder_with_a_plan_alone(place, parts, capsys):
    """Whole it is no interrupted run; an interrupted one rests on what it began with, as any run."""
    assert main(words("run", "--plan")) == 0
    for command, option in (("resume", "`finetune --out"), ("report", "with the other options of the plan")):
        assert main([command, "run"]) == 2
        said = capsys.readouterr().err
        assert "holds a finished plan and no training; to train, use" in said and option in said
    parts.drawn, parts.left = 0, 2
    assert main(words("run", "--plan", "--seed", "1")) == 130
    assert not (place / "run/plan.json").exists()
    shift(place)
    assert main(["resume", "run"]) == 2
    assert "--accept-changes model" in capsys.readouterr().err
    assert main(["resume", "run", "--accept-changes", "model"]) == 0
    assert "plan      drawn again, not reused from" in capsys.readouterr().out
    accepted = json.loads((place / "run/provenance.json").read_text())["accepted"]
    assert len(accepted) == 1 and accepted[0].startswith("model: ")
    edit(place / "my.py", "4", "3")
    (place / "run/plan.json").unlink()
    assert main(["resume", "run"]) == 2
    assert "it has changed since you named it" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_judgement_goes_on(place, parts, capsys):
    """Four parts of the plan, four held out, two before and one of two after: these are not drawn again, nor left."""
    assert main(words("whole")) == 0
    total, parts.drawn, parts.left = parts.drawn, 0, 11
    assert main(words("run")) == 130
    capsys.readouterr()
    assert main(["resume", "run"]) == 0
    assert "judging   continued: 12 of 24 starts are judged" in capsys.readouterr().out
    assert parts.drawn == total
    same_run("run", "whole")


@pytest.mark.slow
def test_the_plan_of_a_sweep_goes_on(place, parts, capsys):
    call = words("sweep", "--kl-weights", "0.5", command="sweep")
    assert main([*call[:-4], "--out", "whole", *call[-2:]]) == 0
    parts.drawn, parts.left = 0, 3
    assert main(call) == 130
    assert f"the same command, with --out {place}/sweep, continues the sweep" in capsys.readouterr().err
    assert len(rewards("sweep")) == 6
    assert main([*call, "--seed", "1"]) == 2
    assert "holds a sweep of other options: seed was 0 and is 1" in capsys.readouterr().err
    assert main(call) == 0
    assert torch.equal(rewards("sweep"), rewards("whole"))
    assert finished(place / "sweep").keys() == {0.5}
    same_run("sweep/beta-0.5", "whole/beta-0.5")
    assert RunDirectory(place / "sweep/beta-0.5").read_config()["plan"] is False
