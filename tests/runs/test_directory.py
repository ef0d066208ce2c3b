import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from implicit_diffusion import __version__
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.runs import RunDirectory


@dataclass(frozen=True)
class Inner:
    lr: float = 5e-5


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/x")
    inner: Inner = field(default_factory=Inner)
    rows: tuple[int, ...] = (0, 9)
    name: str = "β"
    target: float | None = None


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "runs" / "one")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_create_makes_the_folder_and_accepts_an_empty_one(tmp_path):
    run = RunDirectory.create(tmp_path / "a" / "b")
    assert run.path.is_dir()
    assert RunDirectory.create(run.path) == run


def test_create_refuses_a_folder_with_contents_and_leaves_it_alone(tmp_path):
    (tmp_path / "old.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match=r"not empty; choose another `path`") as error:
        RunDirectory.create(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_create_refuses_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="is a file"):
        RunDirectory.create(str(tmp_path / "file"))


@pytest.mark.parametrize("out", ["/proc/run", "{file}/run", "{file}/a/b", "{folder}/" + 300 * "x"])
def test_a_folder_that_cannot_be_made_is_refused(out, tmp_path):
    (tmp_path / "file").touch()
    path = out.format(file=tmp_path / "file", folder=tmp_path)
    with pytest.raises(InvalidInputError, match=r"`(path|folder)` .* cannot be made"):
        RunDirectory.create(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_config_of_a_dataclass(run):
    run.write_config(Config())
    assert read(run.path / "config.json") == {
        "out": "runs/x",
        "inner": {"lr": 5e-5},
        "rows": [0, 9],
        "name": "β",
        "target": None,
    }


def test_config_says_which_command_and_version_began_the_run(run):
    assert run.read_config() is None and run.read_origin() is None
    run.write_config(Config(), "finetune")
    written = read(run.path / "config.json")
    begun = written.pop("begun")
    assert written | {"out": "x"} == {"command": "finetune", "version": __version__} | {
        "out": "x",
        "inner": {"lr": 5e-5},
        "rows": [0, 9],
        "name": "β",
        "target": None,
    }
    assert run.read_origin() == ("finetune", __version__)
    assert run.read_config().keys() == {"out", "inner", "rows", "name", "target"}
    assert run.identity == {"command": "finetune", "begun": begun}
    run.write_config(Config(name="γ"), "finetune")
    assert read(run.path / "config.json")["begun"] == begun  # which is when the run began, however often it is written
    run.write_config({"lr": 1.0})
    assert run.read_origin() is None and run.read_config() == {"lr": 1.0}


def test_what_a_command_left_when_it_ended_early_is_its_own(run):
    run.start("finetune", {"lr": 1.0})
    run.start("finetune", {"lr": 2.0})
    with pytest.raises(InvalidInputError, match="not empty"):
        run.start("sweep", {"lr": 3.0})
    assert run.read_config() == {"lr": 2.0}
    run.checkpoints.save(0, {})
    with pytest.raises(InvalidInputError, match=r"was interrupted: continue with `implicit-diffusion resume"):
        run.start("finetune", {"lr": 2.0})


def test_metrics_are_one_line_per_call_and_on_disk_at_once(run):
    run.append_metrics({"step": 0, "reward": torch.tensor(1.5), "double": torch.tensor(0.1, dtype=torch.float64)})
    run.append_metrics({"step": 1, "numpy": np.float32(0.25), "done": torch.tensor(True), "age": torch.arange(2)})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "reward": 1.5, "double": 0.1},
        {"step": 1, "numpy": 0.25, "done": True, "age": [0, 1]},
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor(float("nan")), np.float64("-inf")])
def test_what_json_does_not_have_is_refused_by_name(run, bad):
    with pytest.raises(NonFiniteError, match=r"held_out\.reward is"):
        run.append_metrics({"step": 3, "held_out": {"reward": bad}})
    assert not (run.path / "metrics.jsonl").exists()
    with pytest.raises(NonFiniteError, match=r"kl\[1\] is"):
        run.write_summary({"kl": [0.0, bad]})
    assert not any(run.path.iterdir())


def test_what_json_cannot_hold_is_refused_by_name(run):
    with pytest.raises(InvalidInputError, match="reward is a function"):
        run.write_config({"reward": read})


def test_summary_replaces_the_previous_one_whole(run, monkeypatch):
    run.write_summary({"updates": 1})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run.write_summary({"updates": 2})
    assert read(run.path / "summary.json") == {"updates": 1}
    run.write_summary({"updates": 3})
    assert read(run.path / "summary.json") == {"updates": 3}


def test_paths(run):
    assert run.figure("before_after") == run.path / "figures" / "before_after.png"
    assert run.figure("frontier").parent.is_dir()
    assert run.model == run.path / "model"
    assert run.checkpoint == run.path / "checkpoint"


def test_metrics_are_read_back_and_forgotten_down_to_the_checkpoint(run):
    assert run.read_metrics() == []
    rows = [{"updates": k, "reward": 1 / (k + 3), "name": "β\u2028"} for k in range(1, 5)]
    for row in rows:
        run.append_metrics(row)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"updates": 5, "rew')  # killed while writing
    assert run.read_metrics() == rows
    run.forget_metrics(3)
    run.append_metrics({"updates": 4})
    assert run.read_metrics() == [*rows[:3], {"updates": 4}]
