"""Black boxes from plan to report: what they share with other rewards, and what an interruption leaves."""

import json

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from tests.helpers.tuned import same_weights, summary_of

REWARDS = """
import os

calls = []

def rounded(x):
    calls.append(len(x))
    size, count = map(int, os.environ.get("FAILS", "0 1").split())
    if size and calls.count(size) == count:
        raise RuntimeError("the service is down")
    return [float(value) for value in (50 * (x.flatten(1).mean(1) + 1)).round()]
"""
SIZES = ["--num-steps", "3", "--batch", "4", "--updates", "6", "--starts", "8", "--lr", "1e-4", "--device", "cpu"]


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "box.py"
    path.write_text(REWARDS)
    return f"{path}:rounded"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("IMPLICIT_DIFFUSION_CACHE", "off")


@pytest.fixture(scope="module")
def whole(box, tmp_path_factory):
    """A run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("IMPLICIT_DIFFUSION_CACHE", "off")
        assert main(["finetune", *SIZES, "--reward", box, "--kl-weight", "2.5", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_a_black_box_has_all_that_other_rewards_have(whole):
    found = summary_of(whole)
    assert found["updates"] == 6 and found["estimator"] == "surrogate"
    assert found["j_bound"] < found["j_before"] and len(found["plan"]) > 1
    assert "estimator surrogate" in (whole / "model" / "README.md").read_text()
    assert "surrogate_explained" in (whole / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_an_interrupted_surrogate_continues_bit_for_bit(box, whole, tmp_path, monkeypatch):
    """Its first pairs are those of the plan, which are not learned a second time."""
    ordinary = training.callbacks

    def interrupted(*arguments):
        def stop(state):
            if state.updates == 3:
                raise KeyboardInterrupt

        return [*ordinary(*arguments), stop]

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "callbacks", interrupted)
        assert main(["finetune", *SIZES, "--reward", box, "--kl-weight", "2.5", "--out", str(out)]) == 130
    assert json.loads((out / "config.json").read_text())["estimator"] == "surrogate"
    assert main(["resume", str(out)]) == 0
    assert same_weights(out, whole) and summary_of(out)["estimator"] == "surrogate"


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["64 2", "4 3"], ids=["second of the plan", "third of the training"])
def test_a_box_that_raises_loses_nothing(fails, box, whole, tmp_path, monkeypatch, capsys):
    """On the second batch of the plan, or the third of the training: mended, the run is one that nothing has met."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setenv("FAILS", fails)
        status = main(["finetune", *SIZES, "--reward", box, "--kl-weight", "2.5", "--out", str(out)])
    assert status != 0 and "the service is down" in capsys.readouterr().err
    assert not (out / "summary.json").exists()
    assert main(["resume", str(out)]) == 0
    assert same_weights(out, whole)


@pytest.mark.slow
def test_a_plan_made_before_is_what_the_surrogate_learns_from(box, whole, tmp_path):
    """The trajectories are read from the folder, and bring the same model as those that were just drawn."""
    call = ["finetune", *SIZES, "--reward", box, "--out", str(tmp_path / "run")]
    assert main([*call, "--plan"]) == 0
    assert main([*call, "--kl-weight", "2.5"]) == 0
    assert same_weights(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_sweep_of_a_black_box(box, whole, tmp_path):
    """Its runs share the plan's trajectories, and are those of `finetune`."""
    assert main(["sweep", *SIZES, "--reward", box, "--kl-weights", "2.5", "--out", str(tmp_path / "sweep")]) == 0
    (row,) = summary_of(tmp_path / "sweep")["rows"]
    run = tmp_path / "sweep" / row["run"]
    assert same_weights(run, whole) and summary_of(run)["estimator"] == "surrogate"


@pytest.mark.slow
def test_adjoint_matching_needs_noise(tmp_path, capsys):
    words = ["--penalty", "drift", "--kl-weight", "1", "--scheduler", "euler", "--estimator", "adjoint-matching"]
    assert main(["finetune", *SIZES, *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "--estimator adjoint-matching is for samplers that forget" in error and "--penalty path-kl" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_target_kl_cannot_be_adapted_to_by_the_last_steps_alone(tmp_path, capsys):
    call = ["finetune", *SIZES, "--estimator", "truncated", "--target-kl", "0.1", "--out", str(tmp_path / "run")]
    assert main(call) == 2
    assert "use --target-kl-mode stop" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*call, "--target-kl-mode", "stop"]) == 0
