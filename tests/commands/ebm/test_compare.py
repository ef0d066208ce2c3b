"""The comparison of arms: fair, kept training by training, and open about what it did not search."""

import dataclasses
import json
import math

import pytest

from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm import compare, judging
from implicit_diffusion.commands.ebm.arms import ARMS, to_model
from implicit_diffusion.commands.ebm.summary import ComparedTraining, CurvePoint
from implicit_diffusion.commands.ebm.training import Trained
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import Fit
from tests.helpers.energy_models import TINY

COMPARE = dataclasses.replace(TINY, compare=True, seeds=2, lr=None, refresh=None)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})


def point(kl, **changes):
    return CurvePoint(log_z=2.0, nll=1.0, kl=kl, updates=3, seconds=1.0, gradient_evaluations=9, **changes)


@pytest.mark.slow
def test_a_comparison_is_fair(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "GRID", (1e-3, 1e-2))
    out = tmp_path / "run"
    config = dataclasses.replace(COMPARE, steps=16, out=out)
    summary = ebm.run(config)
    assert summary.keys() == {"data", "grid", "arms", "paired", "advice"} and set(summary["arms"]) == set(ARMS)
    assert json.loads((out / "summary.json").read_text()) == summary
    pulls = [arm["gradient_evaluations"] for arm in summary["arms"].values()]
    assert max(pulls) == 16 * 4 and min(pulls) > 16 * 4 - 6  # equal except for one update of six pulls
    kls = {(m["arm"], m["lr"], m["seed"]): m["curve"][-1]["kl"] for m in RunDirectory(out).read_metrics()}
    assert len(kls) == 5 * 2 + 4 * 2 and all(line.endswith("may be better") for line in summary["advice"])
    for arm, result in summary["arms"].items():
        kls_of_arm = result["kls"]
        assert result["diverged"] == 0 and len(kls_of_arm) == 2 and result["kl"] == pytest.approx(sum(kls_of_arm) / 2)
        searched = "weighted" if arm == "hmc" else arm  # the ablation has the rate of what it ablates
        assert result["lr"] == min((1e-3, 1e-2), key=lambda lr, grid=summary["grid"][searched]: grid[f"{lr:g}"])
        assert [kls[arm, result["lr"], seed] for seed in (0, 1)] == kls_of_arm
    ratios = [math.log(a / b) for a, b in zip(*(summary["arms"][arm]["kls"] for arm in ("weighted", "cd")))]
    assert summary["paired"]["cd"]["log_ratio"] == pytest.approx(sum(ratios) / 2)
    assert summary["paired"]["cd"]["se"] == pytest.approx(abs(ratios[0] - ratios[1]) / 2)
    assert len(summary["arms"]["weighted"]["log_z_z_scores"]) == 2
    assert (out / "figures" / "comparison.png").exists()
    said = capsys.readouterr().out
    assert "at equal cost" in said and "z-scores of log Z" in said


def test_comparisons_pair_by_seed():
    def curves(**kl):
        return {int(seed[1:]): [point(9.0), point(value)] for seed, value in kl.items()}

    pairs = compare.paired(curves(s0=1.0, s1=2.0), curves(s1=4.0, s0=4.0))
    assert pairs.log_ratio == pytest.approx((math.log(1 / 4) + math.log(1 / 2)) / 2)
    assert compare.paired(curves(s0=1.0, s1=2.0), curves(s0=1.0, s2=2.0)) is None  # another seed is missing in each
    assert compare.paired(curves(s0=1.0), curves(s0=1.0)) is None


def test_a_comparison_survives_arms_that_diverge(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ARMS", ("weighted", "implicit"))

    def diverging(name, settings, judge_steps):
        return ComparedTraining(settings.arm, settings.lr, settings.seed, 3, "far out")

    monkeypatch.setattr(compare, "attempt", diverging)
    summary = ebm.run(dataclasses.replace(COMPARE, out=tmp_path / "run"))
    assert summary["arms"]["weighted"]["kl"] is None and summary["arms"]["weighted"]["diverged"] == 2
    assert summary["paired"] == {"implicit": None} and set(summary["grid"]["weighted"].values()) == {None}
    assert summary["advice"] == []


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch, capsys):
    """What has ended is read back, also past a line that was cut short; Ctrl-C inside a training is no result of it."""
    monkeypatch.setattr(compare, "ARMS", ("weighted", "implicit"))
    monkeypatch.setattr(compare, "GRID", (1e-3, 1e-2, 3e-2))
    made, interrupt_at = [], 4

    def train(settings, data, loop, directory, looks):
        made.append((settings.arm, settings.lr, settings.seed))
        stopped = "interrupted" if len(made) == interrupt_at else None
        kl = {1e-3: 0.5, 1e-2: 0.4, 3e-2: 0.3}[settings.lr] + settings.seed % 7 / 100
        end = point(kl, log_z_particles=2.1 if settings.arm == "weighted" else None)
        return Trained(
            settings, Fit(loop, stopped=stopped, seconds=1.0), loop, to_model(settings, loop, data), [end, end]
        )

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "log_z_by_annealing", lambda *args: (2.0, 0.1))
    out = tmp_path / "run"
    config = dataclasses.replace(COMPARE, out=out)
    with pytest.raises(KeyboardInterrupt, match=r"the same command, with --out .*, continues the comparison"):
        ebm.run(config)
    said = json.loads((out / "config.json").read_text())
    assert (said["seeds"], said["potential"], said["lr"], said["refresh"]) == (2, "mlp", None, None)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"arm": "weighted", "lr": 0.0')
    summary = ebm.run(config)
    assert made[3] == made[4] and len(set(made)) == len(made) - 1 == 2 * (3 + 2)
    assert summary["arms"]["weighted"]["lr"] == 3e-2 and summary["arms"]["weighted"]["kls"] == [0.3, 0.31]
    assert summary["advice"][0] == "weighted: its best rate 0.03 is at the edge of the grid; a larger one may be better"
    assert summary["advice"][0] in capsys.readouterr().out

    (out / "figures" / "comparison.png").unlink()
    assert compare.report(RunDirectory(out)) == summary and len(made) == 11  # from the lines, without a training
    assert (out / "figures" / "comparison.png").exists()
    more = ebm.run(dataclasses.replace(config, seeds=3))  # only the seeds that are new
    assert len(made) == 11 + 2 and more["arms"]["implicit"]["kls"] == [0.3, 0.31, 0.32]
    with pytest.raises(InvalidInputError, match="holds a run of other options: width was 8 and is 16"):
        ebm.run(dataclasses.replace(config, width=16))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InvalidInputError, match=r"lacks the training of implicit at --lr 0.03, seed 2"):
        compare.report(RunDirectory(out))
