"""Judges of a run, end to end on a tiny scale: never raised, their warning, the best model, resuming and refusals."""

import json
from pathlib import Path

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from implicit_diffusion.commands.rewards import trust
from tests.helpers import tuned
from tests.helpers.stops import interrupt_at
from tests.helpers.tuned import same_weights, summary_of

CALLBACKS = training.callbacks
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
    return tuned.home(tmp_path_factory.mktemp("home"), FUNCTIONS)


@pytest.fixture(autouse=True)
def inside(home, monkeypatch, as_users_run):
    monkeypatch.chdir(home)
    (home / "broken").unlink(missing_ok=True)


def words(out, *judges, more=(), updates=10, lr="1e-3", model="model"):
    sizes = ["--num-steps", "3", "--batch", "2", "--updates", str(updates), "--starts", "8", "--lr", lr]
    given = [word for judge in judges for word in ("--judge", judge)]
    small = ["--kl-weight", "0.01", "--device", "cpu", "--out", str(out)]
    return ["finetune", "--model", model, "--reward", "r.py:left", *sizes, *small, *given, *more]


def lines_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def hacked(home):
    """A finished run whose first judge is the opposite of the reward, begun in its folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        assert main(words("hacked", "r.py:against", "r.py:right")) == 0
    return home / "hacked"


@pytest.mark.slow
def test_judges_do_not_change_the_run(hacked, home):
    assert main(words("alone")) == 0
    assert same_weights("alone", hacked)
    ours, plain = summary_of(hacked), summary_of("alone")
    for name in ("reward_before", "reward_after", "j_after", "captured", "network_evaluations"):
        assert ours[name] == plain[name]
    assert plain["judges"] == [] and len(ours["rewards"]) == 1


@pytest.mark.slow
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
    assert json.loads((hacked / "config.json").read_text())["judge"][0] == f"{hacked.parent}/r.py:against"
    assert sorted(int(folder.name) for folder in (hacked / "course").iterdir()) == list(range(1, 11))
    page = (hacked / "report.html").read_text()
    assert "The judge r.py:against fell" in page and "The same noise through the run" in page
    assert {path.stem for path in (hacked / "figures").glob("judges*")} == {"judges"}
    card = (hacked / "model/README.md").read_text()
    assert "\n| r.py:against | " in card and "\n| r.py:right | " in card and "**r.py:against fell: look" in card


@pytest.mark.slow
def test_a_planted_hack_is_warned_of_before_half_of_the_updates(hacked, capsys):
    assert main(words("again", "r.py:against", "r.py:right")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "the judge" in line]
    judge, other = summary_of("again")["judges"]
    assert 0 < judge["warned"] < 5 and judge["fell"]
    assert other["warned"] is None and not other["fell"]
    (line,) = said
    assert line.startswith(f"update {judge['warned']}: the judge r.py:against is ") and "may be hacked" in line


@pytest.mark.slow
def test_the_best_model_by_the_judge_is_exported_where_that_is_asked_for(hacked, capsys):
    assert main(words("best", "r.py:against", more=["--export", "best"])) == 0
    best, last = summary_of("best"), summary_of(hacked)
    (judge,) = best["judges"]
    assert best["kept"]["updates"] == judge["best_update"] < 10 and last["kept"] is None
    assert judge["course"] == last["judges"][0]["course"]
    assert best["reward_after"] < last["reward_after"] and not same_weights("best", hacked)
    assert judge["after"] == pytest.approx(-best["reward_after"], rel=1e-6)
    assert main(words("short", "r.py:against", updates=10, more=["--export", "best"])) == 0
    assert same_weights("short", "best")


@pytest.mark.slow
@pytest.mark.parametrize("update", [1, 6])
def test_an_interrupted_run_resumes_to_the_bit(update, hacked, monkeypatch):
    out = f"stopped-{update}"
    monkeypatch.setattr(training, "callbacks", lambda *given: [*CALLBACKS(*given), interrupt_at(update)])
    assert main(words(out, "r.py:against", "r.py:right", more=["--export", "best"])) == 130
    monkeypatch.setattr(training, "callbacks", CALLBACKS)
    assert main(["resume", out]) == 0
    assert main(words(f"whole-{update}", "r.py:against", "r.py:right", more=["--export", "best"])) == 0
    assert same_weights(out, f"whole-{update}")
    assert summary_of(out)["judges"] == summary_of(f"whole-{update}")["judges"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("judge", "says"), [("late", "not any more"), ("late_nan", "NaN"), ("late_short", "one number per sample")]
)
def test_a_judge_that_fails_stops_the_run_which_resumes(judge, says, home, hacked, monkeypatch, capsys):
    def breaks(fit):
        if fit.updates == 4:
            (home / "broken").touch()

    monkeypatch.setattr(training, "callbacks", lambda *given: [breaks, *CALLBACKS(*given)])
    assert main(words(judge, f"r.py:{judge}")) != 0
    said = capsys.readouterr().err
    assert says in said and "--judge" in said and judge in said and "Traceback" not in said
    (home / "broken").unlink()
    monkeypatch.setattr(training, "callbacks", CALLBACKS)
    assert main(["resume", judge]) == 0
    assert same_weights(judge, hacked)


@pytest.mark.parametrize(
    ("judges", "says"),
    [
        (["r.py:left"], "raised by --reward itself"),
        (["r.py:right", "r.py:right"], "given twice"),
        (["r.py:right=2"], "no weight"),
        (["r.py:nothing"], "has no function"),
        (["r.py:nan"], "NaN"),
        (["r.py:short"], "--judge r.py:short: must return one number per sample"),
        (["r.py:fails"], "not today"),
        (["r.py:labelled"], "labels"),
        (["neither"], "neither"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_the_run(judges, says, capsys):
    assert main(words("refused", *judges)) == 2
    said = capsys.readouterr().err
    assert says in said and "--judge" in said and "Traceback" not in said
    assert not (Path("refused") / "config.json").exists()


def test_the_best_model_needs_a_judge(capsys):
    assert main(words("refused", more=["--export", "best"])) == 2
    assert "--judge" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_another_user_does_not_run_its_judges(home, monkeypatch, tmp_path, capsys):
    (home / "j.py").write_text("def right(x): return x[..., 4:].flatten(1).mean(1)")
    monkeypatch.setattr(training, "callbacks", lambda *given: [*CALLBACKS(*given), interrupt_at(1)])
    assert main(words("foreign", "j.py:right")) == 130
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "_named", set())  # another process of another user, who knows the reward alone
    trust.remember(trust.code_of(f"{home}/r.py:left"))
    capsys.readouterr()
    assert main(["resume", "foreign"]) == 2
    said = capsys.readouterr().err
    assert "--trust-reward" in said and "j.py:right" in said


@pytest.mark.slow
def test_labels_are_given_to_judges_too():
    more = ["--null-class", "2"]
    assert main(words("labelled", "r.py:labelled", model="classes", updates=2, lr="1e-5", more=more)) == 0
    (judge,) = summary_of("labelled")["judges"]
    assert judge["before"] != summary_of("labelled")["reward_before"]
