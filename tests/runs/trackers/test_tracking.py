"""What trackers get: the lines of metrics.jsonl, pictures in the order of steps, nothing twice after a resume."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.errors import InvalidInputError, MissingExtraError, NonFiniteError
from implicit_diffusion.loops import Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.track import Pictures, due
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.runs.study import Study
from implicit_diffusion.runs.trackers.opening import tracked
from implicit_diffusion.runs.trackers.tracking import Tracking, series
from tests.helpers.oracles import affine_chain
from tests.helpers.stops import interrupt_at
from tests.helpers.tracked import of_tensorboard, of_wandb

PIXELS = np.zeros((2, 2, 3), np.uint8)
UPDATES = 12


class Recorder:
    """A tracker that notes all that it is told."""

    def __init__(self):
        self.told = []

    def scalars(self, step, group, numbers):
        self.told.append((step, group, numbers))

    def images(self, step, group, name, pixels):
        self.told.append((step, group, name))

    def rewind(self, step):
        self.told.append(("rewind", step))

    def flush(self):
        self.told.append("flush")

    def close(self):
        self.told.append("close")


def test_pictures_wait_for_the_line_of_their_update():
    recorder = Recorder()
    tracking = Tracking([recorder])
    tracking.picture(0, "samples", PIXELS)
    tracking.picture(2, "samples", PIXELS)
    assert recorder.told == [(0, "", "samples"), "flush"]  # nothing is before the first update
    tracking.lines([{"updates": 1, "loss": 3}, {"updates": 2, "loss": 2.5, "note": "x", "fine": True}])
    tracking.picture(3, "samples", PIXELS)
    tracking.close()
    after = [(1, "", {"loss": 3.0}), (2, "", "samples"), (2, "", {"loss": 2.5}), "flush", (3, "", "samples"), "close"]
    assert recorder.told[2:] == after


def test_the_trainings_of_a_study_keep_apart():
    hexagon = {"arm": "nested", "seed": 1, "iteration": 7, "reward": 0.5, "reward_exact": None}
    compared = {
        "arm": "cd",
        "lr": 0.1,
        "seed": 0,
        "updates": 9,
        "curve": [{"updates": 3, "kl": 1}, {"updates": 9, "kl": 2}],
    }
    adapted = {"updates": 4, "kl_weight": 2.0}
    assert list(series(hexagon)) == [(7, "nested seed 1", {"reward": 0.5})]
    assert list(series(compared)) == [(3, "cd lr 0.1 seed 0", {"kl": 1.0}), (9, "cd lr 0.1 seed 0", {"kl": 2.0})]
    assert list(series(adapted)) == [(4, "", {"kl_weight": 2.0})]


def test_trackers_get_what_the_file_gets(tmp_path):
    recorder = Recorder()
    directory = RunDirectory(RunDirectory.create(tmp_path / "run").path, Tracking([recorder]))
    with pytest.raises(NonFiniteError, match="loss"):
        directory.append_metrics({"updates": 1, "loss": torch.tensor(2.0)}, {"updates": 2, "loss": float("nan")})
    assert recorder.told == [(1, "", {"loss": 2.0}), "flush"]
    assert directory.read_metrics() == [{"updates": 1, "loss": 2.0}]
    Study(directory)
    assert recorder.told[2:] == [("rewind", 0)]  # which makes all of its lines again


def test_the_schedule_has_both_ends_and_about_ten_in_between():
    for total in (1, 7, 10, 25, 250, 9999):
        updates = [n for n in range(total + 1) if due(n, total)]
        assert updates[0] == 0 and updates[-1] == total and len(updates) <= 12
        assert len(updates) > min(total, 5)


def loop():
    chain, reward = affine_chain(4, 2)
    optimizer = torch.optim.Adam(chain.denoiser.parameters(), lr=0.02)
    return Queue(chain, Reward(reward) + 0.3 * PathKL(), Update(optimizer), batch=8, noise=Noise(0))


def draw(state):
    """A picture of samples at fixed noise."""
    x = state.chain.sample(Noise(1), 4)
    return (255 * x.sigmoid()).byte()[..., None].expand(-1, -1, 3).numpy()


def train(folder, trackers, *callbacks):
    trained = loop()
    with tracked(RunDirectory(folder), trackers) as directory:
        fit(trained, UPDATES, callbacks=[Pictures(draw), *callbacks], directory=directory)
    weights = torch.cat([p.detach().flatten() for p in trained.model.parameters()])
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in directory.read_metrics()]
    return weights, rows


def killed_and_resumed(folder, trackers):
    """As after two kills, with the checkpoints of update 0 and of update 5 as the last ones."""

    def keep_first(state):
        if state.updates == 1:
            keep(folder)

    train(folder, trackers, keep_first, interrupt_at(4))
    put_back(folder)
    train(folder, trackers, interrupt_at(5))
    keep(folder)
    train(folder, trackers, interrupt_at(9))
    put_back(folder)
    return train(folder, trackers)


def keep(folder):
    """Copy the checkpoints of a run."""
    for each in folder.glob("checkpoint*"):
        shutil.copytree(each, folder / "aside" / each.name)


def put_back(folder):
    """Put them in the place of later ones."""
    for each in folder.glob("checkpoint*"):
        shutil.rmtree(each)
    for each in (folder / "aside").iterdir():
        each.rename(folder / each.name)
    (folder / "aside").rmdir()


def check_exact(scalars, pictures, rows):
    """Every number of metrics.jsonl is there once, at its step, and the pictures are those of the schedule."""
    names = {name for row in rows for name, value in row.items() if not isinstance(value, str)} - {"updates"}
    assert names | {"seconds"} == scalars.keys() and len(names) > 5
    for name in names:
        written = [(row["updates"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert scalars[name] == written, name
    assert pictures == {"samples": [n for n in range(UPDATES + 1) if due(n, UPDATES)]}


def test_event_files_are_those_of_an_uninterrupted_run_and_change_no_number(tmp_path):
    weights, rows = train(tmp_path / "untracked", [])
    assert not (tmp_path / "untracked" / "tensorboard").exists()
    tracked_weights, tracked_rows = train(tmp_path / "whole", ["tensorboard", "tensorboard"])
    resumed_weights, resumed_rows = killed_and_resumed(tmp_path / "resumed", ["tensorboard"])
    assert torch.equal(weights, tracked_weights) and torch.equal(weights, resumed_weights)
    assert rows == tracked_rows == resumed_rows
    for name in ("whole", "resumed"):
        check_exact(*of_tensorboard(tmp_path / name / "tensorboard"), rows)


@pytest.mark.slow
def test_offline_runs_of_wandb_too(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, rows = killed_and_resumed(tmp_path / "resumed", ["wandb"])
    _, untracked = train(tmp_path / "untracked", [])
    assert rows == untracked
    scalars, pictures, ids = of_wandb(tmp_path / "resumed")
    check_exact(scalars, pictures, rows)
    assert ids == {json.loads((tmp_path / "resumed" / "wandb.json").read_text())["id"]}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_reported_before_any_work(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["ebm", "--track", name, "--out", str(tmp_path / "run")]) == 2
    assert f"pip install 'implicit-diffusion[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(MissingExtraError), tracked(RunDirectory(tmp_path / "run"), [name]):
        pass


@pytest.mark.slow
def test_nobody_who_is_not_logged_in_trains_for_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InvalidInputError, match="WANDB_MODE=offline"), tracked(RunDirectory(tmp_path / "x"), ["wandb"]):
        pass


def test_no_other_tracker_is_known(tmp_path):
    said = "track must be among tensorboard and wandb, got 'mlflow'"
    with pytest.raises(InvalidInputError, match=said), tracked(RunDirectory(tmp_path / "x"), ["mlflow"]):
        pass
