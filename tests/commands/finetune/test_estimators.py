"""`finetune --estimator`: chosen by whether the reward has a gradient, or named; black boxes from plan to report."""

import pytest
import torch

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune.problem.estimators import begin, chosen
from implicit_diffusion.denoisers import Drawn
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.evaluation.chains import conditions_of
from implicit_diffusion.gradients import Adjoint, Surrogate
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.oracles import table
from tests.helpers.tuned import summary_of

REWARDS = """
import pathlib

import torch

calls = [0]

def smooth(x):
    return x.flatten(1).sum(1)

def rounded(x):
    return (10 * x.flatten(1).mean(1)).round()

def of_lists(x):
    return [float(value) for value in x.flatten(1).mean(1)]

def third(x):
    calls[0] += 1
    if calls[0] == 12 and pathlib.Path(__file__).with_name("down").exists():
        raise RuntimeError("the service is down")
    return rounded(x)

def some(x):
    value = rounded(x)
    value[0] = float("nan")
    return value

def short(x):
    return rounded(x)[:1]

def words(x):
    return ["good"] * len(x)

def noisy(x):
    return rounded(x) + torch.randn(len(x))
"""
SIZES = ["--num-steps", "3", "--batch", "4", "--updates", "4", "--starts", "4", "--lr", "1e-3", "--kl-weight", "2.5"]


@pytest.fixture
def finetune(tmp_path, monkeypatch, capsys):
    """Run the command with a reward of the file; its status, what it printed, and its errors."""
    monkeypatch.setenv("IMPLICIT_DIFFUSION_CACHE", "off")
    (tmp_path / "boxes.py").write_text(REWARDS)

    def finetune(reward, *words, out="run"):
        line = ["finetune", *SIZES, "--reward", f"{tmp_path}/boxes.py:{reward}", "--out", str(tmp_path / out), *words]
        status = main(line)
        said = capsys.readouterr()
        return status, said.out, said.err

    return finetune


@pytest.mark.parametrize(
    ("reward", "name", "why"),
    [
        pytest.param("smooth", "adjoint", "has a gradient", marks=pytest.mark.slow),
        ("rounded", "surrogate", "no slope|is flat"),
        pytest.param("of_lists", "surrogate", "not differentiable", marks=pytest.mark.slow),
    ],
)
def test_auto_takes_what_suits_the_reward_and_says_why(reward, name, why, finetune, tmp_path):
    status, said, _ = finetune(reward)
    (line,) = [line for line in said.splitlines() if line.startswith("estimator")]
    assert status == 0 and line.startswith(f"estimator {name}: ")
    assert any(reason in line for reason in why.split("|"))
    assert summary_of(tmp_path / "run")["estimator"] == name
    assert RunDirectory(tmp_path / "run").read_config()["estimator"] == name
    assert f"estimator {name}" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score", "truncated", "adjoint-matching"])
def test_estimators_by_name(name, finetune, tmp_path):
    status, said, _ = finetune("rounded" if name == "score" else "smooth", "--estimator", name, "--loop", "nested")
    assert status == 0 and "estimator" not in said.splitlines()[0]
    assert summary_of(tmp_path / "run")["estimator"] == name


@pytest.mark.parametrize(
    ("reward", "words", "message"),
    [
        ("of_lists", ["--estimator", "adjoint"], "or leave out --estimator adjoint"),
        ("of_lists", ["--estimator", "truncated"], "or leave out --estimator truncated"),
        ("smooth", ["--depth", "2"], "--depth is for --estimator truncated"),
        ("smooth", ["--estimator", "truncated", "--depth", "9"], "depth must lie in 1..3"),
        ("smooth", ["--estimator", "magic"], "magic"),
        ("rounded", ["--penalty", "drift", "--scheduler", "euler"], "--estimator surrogate follows a reward by what"),
        ("some", [], "NaN or infinite"),
        ("short", [], "one number per sample"),
        ("words", [], "one number per sample"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(reward, words, message, finetune, tmp_path):
    status, _, error = finetune(reward, *words)
    assert status == 2 and message in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_box_that_fails_loses_nothing(finetune, tmp_path, capsys):
    """It raises in the plan; once it is mended, the run is the one that nothing has met."""
    (tmp_path / "down").touch()
    status, _, error = finetune("third")
    assert status == 2 and "the service is down" in error
    (tmp_path / "down").unlink()
    assert main(["resume", str(tmp_path / "run")]) == 0
    finetune("third", out="whole")
    one, other = (RunDirectory(tmp_path / name).read_metrics() for name in ("run", "whole"))
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in one] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in other
    ]


@pytest.mark.slow
def test_a_random_box_is_said_to_be_one(finetune):
    status, said, _ = finetune("noisy")
    assert status == 0 and "is random" in said


def test_a_surrogate_learns_from_the_samples_of_the_plan_under_their_conditions():
    labels = Drawn("label", torch.arange(3))
    chain = Chain(lambda x, t, label: 0.1 * x, table(3), (2,), condition=labels)
    noise, reward = Noise(5), lambda x: x.flatten(1).mean(1).round()
    samples = evaluate(chain, reward, noise, starts=20, repeats=2, chunk=8)
    estimator = Surrogate()
    begin(estimator, chain, samples, noise)
    assert estimator.regression.seen == 20
    begin(Adjoint(), chain, samples, noise)  # learns nothing
    drawn = conditions_of(chain, noise, starts=20, repeats=2, chunk=8)
    again = [chain.conditions(noise, 4, [index]) for index in range(5)]
    for name, values in drawn.items():
        assert torch.equal(values, torch.cat([part[name][0] for part in again]))


def test_the_choice_is_the_adjoint_unless_a_reward_has_no_gradient():
    assert chosen("auto", None).name == "adjoint"
    assert chosen("auto", "reward has no slope") == ("surrogate", "reward has no slope")
    assert chosen("score", None) == ("score", None)
