"""The command `theory`: what it leaves behind, and what it refuses."""

import json

import pytest

from implicit_diffusion.commands.theory import command as theory
from implicit_diffusion.commands.theory import figures, lag, runs
from implicit_diffusion.errors import InvalidInputError


@pytest.fixture
def short(monkeypatch):
    """Few runs of each part, and short ones."""
    for name, values in {
        "STEP_SIZES": (0.1, 0.4),
        "RATIOS": (0.1, 0.5),
        "LENGTHS": (2, 3),
        "PACES": (0.2, 0.3),
        "LAG_RATIOS": (0.02, 0.2),
        "MANY": 24,
    }.items():
        for module in (runs, figures, lag):  # by whatever order of tests they were imported
            if hasattr(module, name):
                monkeypatch.setattr(module, name, values)
    monkeypatch.setattr(lag, "PARTICLES", 96)


@pytest.mark.slow
def test_the_command_leaves_numbers_and_figures(tmp_path, short, capsys):
    out = tmp_path / "run"
    written = theory.run(theory.Config(steps=100, copies=3, particles=8, out=out))
    summary = json.loads((out / "summary.json").read_text())
    assert summary == json.loads(json.dumps(written)) and set(summary) == {"rates", "floors", "queue", "lag"}
    for rate in summary["rates"]:
        assert rate["slope_low"] < rate["slope"] < rate["slope_high"]
        assert rate["slope_bound"] == pytest.approx(-1 / 3) and rate["slope_bound"] < rate["slope_bound_with_log"] < 0
        assert ("slope_exact" in rate) is (rate["problem"] == "location")
    assert [floor["problem"] for floor in summary["floors"]] == ["location", "scale", "modes"]
    assert [floor["exponent_h"] is None for floor in summary["floors"]] == [True, False, False]
    assert [len(summary["floors"][0][name]) for name in ("by_step_size", "by_ratio")] == [2, 2]
    assert [(queue["num_steps"], queue["pace"]) for queue in summary["queue"]] == [
        (2, 0.2),
        (2, 0.3),
        (3, 0.2),
        (3, 0.3),
    ]
    assert [point["ratio"] for point in summary["lag"]["points"]] == [0.02, 0.2]
    assert {path.stem for path in (out / "figures").glob("*.png")} == {"rates", "floors", "queue", "lag"}
    assert "bound     -0.333" in capsys.readouterr().out


def test_one_part_alone(tmp_path):
    written = theory.run(theory.Config(parts=("rates",), steps=100, copies=2, particles=8, out=tmp_path / "run"))
    assert set(written) == {"rates"} and [p.name for p in (tmp_path / "run" / "figures").iterdir()] == ["rates.png"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parts": ()}, "--parts"),
        ({"parts": ("lag", "lag")}, "--parts"),
        ({"steps": 99}, "--steps"),
        ({"copies": 1}, "--copies"),
        ({"particles": 7}, "--particles"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_bad_numbers_are_named_before_any_work(tmp_path, change, named):
    with pytest.raises(InvalidInputError, match=named):
        theory.run(theory.Config(out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
