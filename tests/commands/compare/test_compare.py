"""The comparison as a command: a tiny run to its report, its search, what is refused."""

import dataclasses
import json
import math

import pytest

from implicit_diffusion import cli
from implicit_diffusion.commands.compare import command as compare
from implicit_diffusion.commands.compare.config import NAMES, PROBLEMS, Config
from implicit_diffusion.commands.compare.methods import METHODS
from implicit_diffusion.commands.compare.problems import build
from implicit_diffusion.commands.compare.summary import Summary
from implicit_diffusion.commands.compare.table import rows
from implicit_diffusion.commands.compare.training import Budget, Judge, search, train
from implicit_diffusion.commands.shared.summaries import from_json
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory

TINY = Config(
    problems=("gaussian",),
    num_steps=3,
    batch=4,
    depth=2,
    batches=2,
    updates=16,
    points=2,
    held_out=8,
    widest=3,
    seeds=2,
)


def test_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "run"
    config = dataclasses.replace(TINY, methods=("adjoint", "ddpo", "best-of"), seeds=1, updates=4, out=out)
    summary = compare.run(config)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert [each["method"] for each in summary["gradients"]] == ["adjoint", "ddpo"]
    assert [each["method"] for each in summary["reached"]] == ["adjoint", "ddpo", "best-of"]
    assert len(RunDirectory(out).read_metrics()) == 2 * 2 + 1
    assert "best-of" in (out / "report.html").read_text() and "bound J*" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tiny_run_compares_every_method(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("implicit_diffusion.commands.compare.problems.PAIRS", 8)
    out = tmp_path / "run"
    summary = compare.run(dataclasses.replace(TINY, out=out))
    assert json.loads((out / "summary.json").read_text()) == summary
    assert [each["method"] for each in summary["gradients"]] == [n for n in NAMES if METHODS[n].measured]
    assert [each["method"] for each in summary["reached"]] == [n for n in NAMES if METHODS[n].trains]
    (problem,) = summary["problems"]
    budget = 16 * 4 * (2 * 3 + 3)
    for each in summary["reached"]:
        assert each["search"]["evaluations"] >= 0 and len(each["search"]["falls"]) == 3
        assert each["diverged"] == 0 and len(each["curves"]) == 2
        untrained = each["method"] in ("guidance", "best-of")
        for curve in each["curves"]:
            assert len(curve) == (1 if untrained else 2)
            assert curve[-1]["evaluations"] == 0 if untrained else curve[-1]["evaluations"] >= budget
            assert curve[-1]["evaluations"] < budget + 4 * 12 * 3
    captured = {each["method"]: each["captured"] for each in summary["reached"]}
    possible = problem["before"] - problem["best"]
    assert captured["adjoint"] > 0.3 and possible > 0  # training improves what it says it does
    assert len(RunDirectory(out).read_metrics()) == 2 * 2 * 11 + 2 * 2
    assert {file.name for file in (out / "figures").iterdir()} == {"comparison.png"}
    page = (out / "report.html").read_text()
    assert all(f">{name}</th>" in page for name in NAMES) and "captured" in page
    shown = capsys.readouterr().out
    assert "bound J*" in shown and str(out) in shown
    (lines,) = [list(rows(each, from_json(Summary, summary))) for each in from_json(Summary, summary).problems]
    assert [line[0] for line in lines] == list(NAMES) and {len(line) for line in lines} == {15}


def test_names_of_options_are_those_of_the_methods():
    assert tuple(METHODS) == NAMES and len(PROBLEMS) == 4


def test_equal_budgets():
    """The budget is what the adjoint's updates take, and no method stops before it."""
    problem = build("gaussian", 3, 8, Noise(0))
    budget = Budget(updates=6, batch=4, depth=2, points=1, held_out=8)
    judge = Judge(problem, Noise(1), 8)
    for method, most in (("adjoint", 0), ("draft", 4 * 7), ("grpo", 4 * 15), ("score-queue", 4 * 9)):
        (end,) = train(problem, method, 1e-3, budget, Noise(2), judge, 1)
        assert 0 <= end.evaluations - budget.evaluations(problem.pretrained) <= most, method
    (end,) = train(problem, "adjoint", 1e-3, budget, Noise(2), judge, 1)
    assert end.updates == 6


def test_a_training_that_overflows_is_told_apart():
    problem = build("gaussian", 3, 8, Noise(0))
    budget = Budget(updates=6, batch=4, depth=2, points=1, held_out=8)
    assert train(problem, "adjoint", 1e200, budget, Noise(2), Judge(problem, Noise(1), 8), 1) == []


def test_the_pretrained_chain_has_no_fall():
    problem = build("gaussian", 3, 8, Noise(0))
    point = Judge(problem, Noise(1), 8)(problem.chain())
    assert point.fall == (0, 0) and point.path_kl == 0


@pytest.mark.parametrize(
    ("peak", "best", "inside", "tries"), [(0.0, 1.0, True, 3), (3.2, 8.0, True, 6), (-2.9, 0.125, True, 6)]
)
def test_the_search_goes_on_until_its_best_is_inside(peak, best, inside, tries):
    seen = []
    found = search(lambda x: seen.append(x) or -((math.log2(x) - peak) ** 2), 1.0, 2.0, 9)
    assert (found.best, found.inside, len(found.falls)) == (best, inside, tries) and len(set(seen)) == tries


def test_the_search_says_where_it_ended_at_an_edge():
    rising = search(lambda x: x, 1.0, 2.0, 4)
    assert rising.best == 4.0 and not rising.inside and list(rising.falls) == ["0.5", "1", "2", "4"]
    diverging = search(lambda x: -math.inf if x > 0.1 else -x, 1.0, 3.0, 8)
    assert diverging.best < 0.1 and diverging.falls["1"] is None
    lost = search(lambda x: -math.inf, 1.0, 3.0, 5)
    assert not lost.inside and set(lost.falls.values()) == {None}
    bounded = search(lambda x: -x, 4.0, 2.0, 8, least=1.0)
    assert bounded.best == 1.0 and bounded.inside and "0.5" not in bounded.falls


BAD = {
    "--num-steps must be an integer": {"num_steps": 1},
    "--depth must be at most --num-steps": {"depth": 9},
    "--batch must be a multiple of 4": {"batch": 6, "methods": ("adjoint", "grpo")},
    "--problems must be different names": {"problems": ()},
    "--methods must be different names": {"methods": ("score", "score")},
    "--factor must be above 1": {"factor": 1.0},
    "--factor must be above": {"factor": math.nan},
    "--batches must be 0 or at least 2": {"batches": 1},
    "there is nothing to compare": {"batches": 0, "updates": 0},
    "brightness-rounded does not have; add one of score": {
        "problems": ("gaussian", "brightness-rounded"),
        "methods": ("adjoint", "guidance"),
    },
    "--widest": {"widest": 2},
    "--seeds": {"seeds": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_named_and_leave_no_folder(message, tmp_path):
    with pytest.raises(InvalidInputError, match=message.replace("*", r"\*")):
        compare.run(dataclasses.replace(TINY, out=tmp_path / "run", **BAD[message]))
    assert not (tmp_path / "run").exists()


def test_unknown_names_are_refused(tmp_path, capsys):
    assert cli.main(["compare", "--methods", "reinforce", "--out", str(tmp_path / "run")]) == 2
    assert "adjoint-queue" in capsys.readouterr().err


def test_only_groups_need_a_batch_of_whole_groups():
    dataclasses.replace(TINY, batch=6, methods=("adjoint", "score", "ddpo")).check()


def test_groups_that_processes_cannot_share_are_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "world_size", lambda: 2)
    config = dataclasses.replace(TINY, batch=12, methods=("adjoint", "grpo"), out=tmp_path / "run")
    with pytest.raises(InvalidInputError, match="--batch must be a multiple of 8, got 12: grpo makes groups of 4"):
        compare.run(config)
    compare.check_batch(dataclasses.replace(config, methods=("adjoint",)))
    assert not (tmp_path / "run").exists()
