"""Studies that are interrupted, and are continued: the same numbers, bit for bit, and no run made twice."""

import json
from dataclasses import replace
from functools import partial

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.compare import command as compare
from implicit_diffusion.commands.hexagon import arms as hexagon_arms
from implicit_diffusion.commands.hexagon import command as hexagon
from implicit_diffusion.commands.hexagon import figures as hexagon_figures
from implicit_diffusion.commands.recovery import command as recovery
from implicit_diffusion.commands.recovery import config as recovery_config
from implicit_diffusion.commands.theory import runs as theory_runs
from implicit_diffusion.commands.tilt import command as tilt
from implicit_diffusion.commands.tilt import training as tilt_training
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.study import Study
from tests.helpers.energy_models import bent


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name != "seconds"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def result(folder):
    """Summary, metrics, figures and models."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.suffix in (".png", ".safetensors")}
    return (
        without_times(json.loads((folder / "summary.json").read_text())),
        without_times(RunDirectory(folder).read_metrics()),
        {name: path.read_bytes() for name, path in files.items() if name.parts[0] in ("model", "figures")},
    )


def sketch(sigma, traces, directory):
    """What the figures of the hexagon are drawn from, since drawing takes seconds."""
    drawn = [
        [trace.arm, trace.seed, trace.tail, [x.tolist() for cloud in trace.clouds for x in cloud]] for trace in traces
    ]
    directory.figure("sketch").write_text(json.dumps(drawn))


def interrupting(train, at):
    """Ctrl-C when a run is begun for the `at`-th time."""
    calls = []

    def stopping(*arguments, **options):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    return stopping, calls


STUDIES = {
    "tilt": (
        tilt,
        "train",
        ["--kl-weights", "0.5", "1", "--steps", "3", "--particles", "16", "--seeds", "2", "--model"],
        8,
    ),
    "recovery": (recovery, "train", ["--steps", "6", "--particles", "8", "--seeds", "1"], 4),
    "hexagon": (
        hexagon_arms.Arms,
        "run",
        ["--steps", "20", "--particles", "16", "--seeds", "1", "--tune", "--grid", "0.1", "1"],
        9,
    ),
    "compare": (
        compare,
        "train",
        [
            *("--problems", "gaussian", "--methods", "adjoint", "guidance", "--num-steps", "2", "--depth", "2"),
            *("--batch", "4", "--batches", "2", "--updates", "2", "--points", "1", "--held-out", "8", "--widest", "3"),
            *("--seeds", "1"),
        ],
        8,
    ),
    "theory": (
        theory_runs,
        "settled",
        ["--parts", "floors", "rates", "--steps", "100", "--copies", "3", "--particles", "8"],
        4,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "recovery")) for name in STUDIES]
)
def test_a_study_goes_on_where_it_was_interrupted(name, tmp_path, monkeypatch, capsys):
    module, function, call, runs = STUDIES[name]
    monkeypatch.setattr(tilt_training, "ANNEALING", 5)
    monkeypatch.setattr(recovery, "TAIL", 4)
    monkeypatch.setattr(recovery_config, "TAIL", 4)
    monkeypatch.setattr(hexagon_figures, "draw", sketch)
    monkeypatch.setattr(theory_runs, "STEP_SIZES", (0.1, 0.4))
    monkeypatch.setattr(theory_runs, "RATIOS", (0.1, 0.5))
    monkeypatch.setattr(compare, "draw", lambda summary, path: None)  # it has a panel against seconds
    monkeypatch.setattr(hexagon, "HexagonQuadrature", partial(hexagon.HexagonQuadrature, cells=80))
    bent().save(tmp_path / "model")
    call = [name, *call, *([str(tmp_path / "model")] if name == "tilt" else []), "--out"]
    assert main([*call, str(tmp_path / "whole")]) == 0
    train, made = getattr(module, function), 0
    for at, again in ((3, [*call, str(tmp_path / "run")]), (2, ["resume", str(tmp_path / "run")])):
        stopping, calls = interrupting(train, at)
        monkeypatch.setattr(module, function, stopping)
        assert main(again) == 130
        assert f"continue with `implicit-diffusion resume {tmp_path / 'run'}`" in capsys.readouterr().err
        made += len(calls) - 1
    stopping, calls = interrupting(train, 0)
    monkeypatch.setattr(module, function, stopping)
    assert main([*call, str(tmp_path / "run")]) == 2  # its folder is taken
    assert "resume" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert made == 3 and made + len(calls) == runs
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    shown = capsys.readouterr().out
    monkeypatch.setattr(module, function, lambda *arguments: pytest.fail("a report runs nothing"))
    for figure in (tmp_path / "run" / "figures").iterdir():
        figure.unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert result(tmp_path / "run") == result(tmp_path / "whole") and capsys.readouterr().out in shown


def test_a_run_that_raises_is_not_kept(tmp_path):
    directory = RunDirectory.create(tmp_path / "study")
    study = Study(directory)
    assert study.once("a", 0.1, make=lambda: {"x": 0.1 + 0.2}, lines=lambda result: [result]) == {"x": 0.1 + 0.2}
    with pytest.raises(ZeroDivisionError):
        study.once("a", 0.2, make=lambda: 1 / 0)
    again = Study(directory)
    assert directory.read_metrics() == []
    assert again.once("a", 0.1, make=lambda: pytest.fail("made twice"), lines=lambda result: [result])["x"] == 0.1 + 0.2
    assert again.once("a", 0.2, make=lambda: 7) == 7 and directory.read_metrics() == [{"x": 0.1 + 0.2}]
    directory.checkpoints.save(3, {"loop": 1})
    with pytest.raises(InvalidInputError, match="checkpoint does not hold a study"):
        Study(directory)


def test_weights_that_round_to_one_name_have_models_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tilt_training, "ANNEALING", 5)
    bent().save(tmp_path / "model")
    config = tilt.Config(tmp_path / "model", kl_weights=(1.0, 1.0000001), arms=("unweighted",), steps=2, particles=16)
    tilt.run(replace(config, seeds=1, out=tmp_path / "run"))
    assert {folder.name for folder in (tmp_path / "run" / "model").iterdir()} == {"w-1", "w-1.0000001"}
    with pytest.raises(InvalidInputError, match=r"--kl-weights must differ"):
        replace(config, kl_weights=(1.0, 1.0)).check()
