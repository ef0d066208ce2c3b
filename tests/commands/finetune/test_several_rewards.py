"""Several rewards in one run, end to end on a tiny scale: their units, plan, course, judgement and refusals."""

import json
import shutil
from pathlib import Path

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import planning, training
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.result import read_result
from implicit_diffusion.commands.shared.formatting import number
from implicit_diffusion.runs import RunDirectory
from tests.helpers import tuned
from tests.helpers.stops import interrupt_at
from tests.helpers.tuned import same_weights, summary_of

CALLBACKS = training.callbacks
REWARDS = """
def left(x): return x[..., :4].flatten(1).mean(1)
def large(x): return 1024 * left(x)
def wide(x): return x.flatten(1).std(1)
def labelled(x, labels): return left(x) * (labels.to(x.dtype) + 1)
def flat(x): return 0 * left(x) + 3
def rounded(x): return (8 * left(x)).round()
def outside(x): return left(x).detach()
def scalar(x): return x.mean()
def fails(x): raise ValueError("not today")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tuned.home(tmp_path_factory.mktemp("home"), REWARDS)


@pytest.fixture(autouse=True)
def inside(home, monkeypatch, as_users_run):
    monkeypatch.chdir(home)


def words(out, *rewards, command="finetune", model="model", more=()):
    sizes = ["--num-steps", "3", "--batch", "2", "--updates", "4", "--starts", "8", "--lr", "1e-5", "--device", "cpu"]
    given = [word for reward in rewards for word in ("--reward", reward)]
    return [command, "--model", model, *sizes, *given, "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(home):
    """A finished run of two rewards, begun in its folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        assert main(words("both", "r.py:left", "r.py:wide=-0.5", more=["--judge", "r.py:large"])) == 0
    return home / "both"


def test_the_reward_is_the_weighted_sum_in_deviations(finished):
    summary, plan = summary_of(finished), json.loads((finished / "plan.json").read_text())
    both = summary["rewards"]
    assert [(each["name"], each["weight"]) for each in both] == [("r.py:left", 1.0), ("r.py:wide", -0.5)]
    for name, when in (("reward_before", "before"), ("reward_after", "after"), ("reward_gain", "gain")):
        total = sum(each["weight"] * each[when] / each["deviation"] for each in both)
        assert summary[name] == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert sum(each["weight"] * each["expected"] / each["deviation"] for each in both) > 0
    assert [each["name"] for each in plan["rewards"]] == ["r.py:left", "r.py:wide"]
    for row, of_all in enumerate(plan["rows"]):
        gains = (each["weight"] * each["gain"][row] / each["reward_std"] for each in plan["rewards"])
        assert sum(gains) == pytest.approx(of_all["reward_gain"], rel=1e-4, abs=1e-6)
    assert [each["reward_std"] for each in plan["rewards"]] == [each["deviation"] for each in both]
    assert json.loads((finished / "config.json").read_text())["reward"] == [
        f"{finished.parent}/r.py:left",
        f"{finished.parent}/r.py:wide=-0.5",
    ]


def test_each_has_a_curve_on_held_out_noise(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    deviations = [(each["weight"], each["deviation"]) for each in summary_of(finished)["rewards"]]
    looks = [line for line in lines if "held_out_reward" in line]
    assert len(looks) == 4
    for line in looks:
        seen = [line[f"held_out_reward/r.py:{name}"] for name in ("left", "wide")]
        assert line["held_out_reward_se/r.py:left"] > 0
        total = sum(w * value / std for value, (w, std) in zip(seen, deviations))
        assert line["held_out_reward"] == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_report_and_model_card_name_each(finished):
    title, page = "r.py:left − 0.5 × r.py:wide", (finished / "report.html").read_text()
    assert f"fine-tuned for {title}</title>" in page and "What became of each reward" in page
    assert (finished / "figures/rewards.png").exists() and "<h2>Each reward</h2>" in page
    assert page.count('<th scope="col">r.py:wide</th>') == 1 and page.count('<th scope="row">r.py:wide</th>') == 1
    card = (finished / "model/README.md").read_text()
    (judge,) = summary_of(finished)["judges"]
    before, after = (number(judge[when], judge[f"{when}_se"]) for when in ("before", "after"))
    assert f"\n| r.py:large | {before} | {after} | " in card and ("r.py:large fell" in card) == judge["fell"]
    assert f"fine-tuned for {title}" in card and "| r.py:wide (weight -0.5, deviation" in card
    result = read_result(RunDirectory(finished))
    assert result.before.rewards is not None and result.before.rewards.shape == (8, 8, 3)


@pytest.mark.slow
def test_units_do_not_matter(finished, home):
    """1 : 1024, a power of two, so that not even rounding differs."""
    assert main(words("units", "r.py:large", "r.py:wide=-0.5")) == 0
    assert same_weights(finished, "units")
    ours, theirs = summary_of(finished), summary_of("units")
    for name in ("reward_before", "reward_after", "path_kl", "j_after", "j_bound", "captured", "kl_weight"):
        assert ours[name] == theirs[name]
    left, large = ours["rewards"][0], theirs["rewards"][0]
    for name in ("deviation", "before", "after", "gain", "gain_se", "expected"):
        assert large[name] == 1024 * left[name]
    assert large["captured"] == left["captured"] and ours["rewards"][1] == theirs["rewards"][1]


@pytest.mark.slow
def test_other_weights_reuse_the_trajectories_of_a_plan(finished, monkeypatch, capsys):
    assert main(words("planned", "r.py:left=3", "r.py:wide=7", more=["--plan"])) == 0
    said = capsys.readouterr().out
    assert "What of each reward is gained" in said and "in deviations" in said
    with monkeypatch.context() as patched:
        patched.setattr(planning, "draw", lambda *arguments: pytest.fail("drawn again"))
        assert main(words("planned", "r.py:left", "r.py:wide=-0.5")) == 0
    assert same_weights(finished, "planned")
    assert summary_of("planned")["plan"] == summary_of(finished)["plan"]
    said = capsys.readouterr().out
    assert "r.py:wide" in said and "the best law for the sum gains" in said


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["queue", pytest.param("nested", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(loop, home, monkeypatch):
    rewards = ("r.py:left", "r.py:wide=2")
    assert main(words(f"whole {loop}", *rewards, more=["--loop", loop])) == 0
    with monkeypatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(2), *CALLBACKS(*arguments)])
        assert main(words(f"half {loop}", *rewards, more=["--loop", loop])) == 130
    assert main(["resume", f"half {loop}"]) == 0
    assert same_weights(f"whole {loop}", f"half {loop}")
    ours, theirs = (summary_of(f"{part} {loop}") | {"seconds": 0} for part in ("whole", "half"))
    assert ours == theirs


@pytest.mark.slow
def test_a_run_directory_is_not_trusted_with_a_second_reward(home, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(2), *CALLBACKS(*arguments)])
        assert main(words("mine", "r.py:left", "r.py:wide")) == 130
    shutil.copytree("mine", "theirs")
    (home / "theirs/evil.py").write_text("open('ran', 'w')\ndef f(x): return x.flatten(1).mean(1)\n")
    config = json.loads(Path("theirs/config.json").read_text())
    config["reward"][1] = f"{home}/theirs/evil.py:f=2"
    Path("theirs/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["resume", "theirs"]) == 2
    assert "lies inside the run directory" in capsys.readouterr().err and not Path("ran").exists()


@pytest.mark.slow
def test_rewards_with_and_without_labels_are_mixed(home):
    assert main(words("labels", "r.py:labelled", "r.py:wide", model="classes")) == 0
    labelled, wide = summary_of("labels")["rewards"]
    assert labelled["gain"] is not None and wide["deviation"] > 0
    plan = json.loads(Path("labels/plan.json").read_text())
    rewards = planning.read_rewards(RunDirectory("labels")).rewards
    assert plan["rewards"][0]["reward_std"] == rewards[..., 0].double().var(1).mean().sqrt().item()


@pytest.mark.slow
def test_without_a_bound_gains_are_known_and_nothing_is_expected(home):
    more = ["--penalty", "drift", "--kl-weight", "0.5"]
    assert main(words("drift", "r.py:left", "r.py:wide", more=more)) == 0
    for each in summary_of("drift")["rewards"]:
        assert each["expected"] is None and each["captured"] is None and each["gain_se"] > 0


@pytest.mark.slow
def test_a_sweep(home, capsys):
    weights = ["--kl-weights", "1", "3"]
    assert main(words("sweep", "r.py:left", "r.py:wide=2", command="sweep", more=["--updates", "2", *weights])) == 0
    summary = summary_of("sweep")
    assert summary["reward"] == "r.py:left + 2 × r.py:wide"
    both = summary_of("sweep/beta-1")["rewards"]
    plan = json.loads(Path("sweep/beta-1/plan.json").read_text())["rewards"]
    total = sum(each["weight"] * each["reward"] / each["reward_std"] for each in plan)
    assert summary["reward_pretrained"] == pytest.approx(total, rel=1e-4) and len(both) == 2


def test_a_single_reward_is_listed_and_stays_in_its_own_units(home):
    assert main(words("one", "r.py:large")) == 0
    summary = summary_of("one")
    (only,) = summary["rewards"]
    assert (only["name"], only["weight"]) == ("r.py:large", 1.0)
    for name in ("before", "after", "gain", "exported"):
        assert only[name] == pytest.approx(summary[f"reward_{name}"], rel=1e-6)
    plan = json.loads(Path("one/plan.json").read_text())
    assert "rewards" not in plan and plan["reward_std"] == only["deviation"] > 10
    assert not Path("one/figures/rewards.png").exists()
    assert Config(reward="r.py:large").reward == ("r.py:large",)
    lines = Path("one/metrics.jsonl").read_text()
    assert "held_out_reward" in lines and "held_out_reward/" not in lines


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (("r.py:left", "r.py:left=2"), "--reward r.py:left is given twice"),
        (
            ("r.py:left=x", "r.py:wide"),
            "r.py:left: its weight, behind the =, must be a finite number, got 'x'",
        ),
        (("r.py:left=0", "r.py:wide=0"), "its weight is 0"),
        (("r.py:left=2",), "a single reward has no weight; leave =2 out, and use --kl-weight"),
        (tuple(f"digit-{d}" for d in range(9)), "--reward is given 9 times; at most 8"),
        (("r.py:left", "r.py:missing=2"), "no function 'missing'"),
        (("r.py:scalar", "r.py:left"), "r.py:scalar: reward must return one number per sample"),
        (("r.py:left", "r.py:fails=2"), "r.py:10: ValueError: not today"),
        (
            ("r.py:left", "r.py:labelled"),
            "r.py:labelled: reward takes two arguments, the samples and what they were sampled under",
        ),
    ],
)
def test_what_is_refused_before_any_work(rewards, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "planned", lambda *arguments: pytest.fail("work has begun"))
    assert main(words(tmp_path / "run", *rewards)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error, error
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_one_without_a_gradient_makes_the_sum_a_black_box(home, capsys):
    """Its gradient without the part of that one would be that of another reward."""
    assert main(words("refused", "r.py:left", "r.py:outside", more=["--estimator", "adjoint"])) == 2
    assert "r.py:outside: reward is not differentiable" in capsys.readouterr().err
    assert main(words("mixed", "r.py:wide", "r.py:rounded=0.5")) == 0
    summary = summary_of("mixed")
    assert summary["estimator"] == "surrogate" and [each["weight"] for each in summary["rewards"]] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (("r.py:left", "r.py:flat"), "reward r.py:flat is 3 for every pretrained sample; leave it out"),
        (("r.py:left=2", "r.py:large=-2"), "fine-tuning needs one that varies"),  # 2 left/σ − 2 left/σ
    ],
)
def test_what_the_plan_refuses(rewards, message, tmp_path, capsys):
    assert main(words(tmp_path / "run", *rewards)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "plan.json").exists() and not (tmp_path / "run" / "config.json").exists()
