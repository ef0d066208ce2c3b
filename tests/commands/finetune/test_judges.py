"""Judges of a run, end to end on a tiny scale: never raised, their warning, the best model, resuming and refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from tests.helpers import tiny, toy_model

CALLBACKS = training.callbacks
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"
FUNCTIONS = """
from pathlib import Path
def left(x): return x[..., :4].flatten(1).mean(1)
def against(x): return -left(x)
def right(x): return x[..., 4:].flatten(1).mean(1)
def nan(x): return left(x) / 0 * 0
def short(x): return left(x)[:1]
def fails(x): raise ValueError("not today")
def labelled(x, labels): return left(x) * (labels.to(x.dtype) + 1)
def late(x):
    if len(x) > 2 and left(x).mean() > -9 and Path("broken").exists():
        raise ValueError("not any more")
    return left(x)
def late_nan(x): return left(x) * (float("nan") if Path("broken").exists() else 1.0)
def late_short(x): return left(x)[: 1 if Path("broken").exists() else None]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    toy_model.folder(home / "model", tiny.scheduler())
    tiny.class_conditional(home / "classes")
    (home / "r.py").write_text(FUNCTIONS)
    return home


@pytest.fixture(autouse=True)
def inside(home, monkeypatch, as_users_run):
    monkeypatch.chdir(home)
    (home / "broken").unlink(missing_ok=True)


def words(out, *judges, more=(), updates=10, lr="1e-5", model="model"):
    sizes = ["--num-steps", "3", "--batch", "2", "--updates", str(updates), "--starts", "8", "--lr", lr]
    given = [word for judge in judges for word in ("--judge", judge)]
    return [
        "finetune",
        "--model",
        model,
        "--reward",
        "r.py:left",
        *sizes,
        "--device",
        "cpu",
        *given,
        "--out",
        str(out),
        *more,
    ]


def summary_of(out):
    return json.loads((Path(out) / "summary.json").read_text())


def lines_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def same_weights(one, other):
    ours, theirs = (load_file(Path(run) / WEIGHTS) for run in (one, other))
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def hacked(home):
    """A finished run whose first judge is the opposite of the reward, begun in its folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        assert main(words("hacked", "r.py:against", "r.py:right", lr="1e-2")) == 0
    return home / "hacked"


def test_judges_do_not_change_the_run(hacked, home):
    assert main(words("alone", lr="1e-2")) == 0
    assert same_weights("alone", hacked)
    ours, plain = summary_of(hacked), summary_of("alone")
    for name in ("reward_before", "reward_after", "j_after", "captured", "network_evaluations"):
        assert ours[name] == plain[name]
    assert plain["judges"] == [] and len(ours["rewards"]) == 1


def test_the_opposite_of_the_reward_is_its_mirror_image(hacked):
    summary = summary_of(hacked)
    judge, other = summary["judges"]
    assert (judge["name"], other["name"]) == ("r.py:against", "r.py:right")
    for ours, reward in (("before", "reward_before"), ("after", "reward_after"), ("change", "reward_gain")):
        assert judge[ours] == pytest.approx(-summary[reward], rel=1e-6)
    seen = [line for line in lines_of(hacked) if "held_out_judge/r.py:against" in line]
    assert len(judge["course"]) == len(other["course"]) == 10
    assert all(line["held_out_judge/r.py:against"] == pytest.approx(-line["held_out_reward"]) for line in seen)
    assert judge["best_update"] == max(judge["course"], key=lambda look: look["change"])["updates"]
