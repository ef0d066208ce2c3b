"""A start by score matching within `ebm`: the law that it hands over, its cost, interruptions to the bit, refusals."""

import dataclasses
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.commands.ebm import arms, judging, report
from implicit_diffusion.commands.ebm.arms import ScoreStart, Settings, make_loop, pulls_per_update
from implicit_diffusion.commands.ebm.config import Config
from implicit_diffusion.commands.ebm.data import load_data
from implicit_diffusion.commands.ebm.starts import by_scores
from implicit_diffusion.commands.ebm.starts.by_scores import StartByScores
from implicit_diffusion.commands.ebm.summary import Started
from implicit_diffusion.commands.ebm.training import train
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import ScoreMatching, Single
from implicit_diffusion.models.energy_model import Architecture, Moves
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import Fit
from tests.helpers.energy_models import summary

HMC2 = Moves("hmc", 0.5, 2)
START = ScoreStart(5, 0.5)
SETTINGS = Settings(Architecture("mlp", (1,), 8, 1), HMC2, "weighted", 16, 4, 0.03, 0, start=START)
SHORT = ["--steps", "4", "--particles", "16", "--width", "4", "--judge-steps", "4", "--start-by", "score-matching"]


@pytest.fixture(scope="module", autouse=True)
def short():
    """Annealing of few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "REFRESH_STEPS", 6)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Quantiles of N(10, 3²)."""
    path = tmp_path_factory.mktemp("data") / "normal.npy"
    quantiles = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)
    np.save(path, (10 + 3 * quantiles[:, None]).float().numpy())
    return path


@pytest.fixture(scope="module")
def data(file):
    return load_data(str(file), Noise(0))


def test_particles_take_over_the_law_of_data_with_noise(data):
    """Of standardised Gaussian data with noise σ = 1: the variance is 2. Log Z beside that of a grid."""
    settings = dataclasses.replace(SETTINGS, particles=320, start=ScoreStart(100, 1.0))
    loop = make_loop(settings, data)
    start = StartByScores(settings, data.standardised()[0], 1)
    start.begin(fit := Fit(loop))
    axis = torch.arange(-8, 8, 0.01)[:, None]
    with torch.no_grad():
        energy = loop.model(axis).double()
    density = (-energy).softmax(0)
    variance = (density * axis[:, 0] ** 2).sum().item()
    assert variance == pytest.approx(2, abs=0.2)
    exact, said = (-energy).logsumexp(0).item() + math.log(0.01), start.started
    assert abs(said.log_z - exact) < 4 * said.log_z_se < 0.1
    assert loop.particles.log_z.item() == pytest.approx(said.log_z, abs=1e-4)
    assert loop.particles.ess.item() == pytest.approx(said.ess, rel=1e-4)
    weights, x = loop.particles.weights, loop.particles.x[:, 0]
    assert abs((weights * x**2).sum().item() - variance) < 4 * math.sqrt(2 * variance**2 / said.ess)
    assert said.updates == 100 and fit.updates == 0 and fit.seconds == said.seconds > 0


def test_a_start_counts_in_the_cost_and_is_made_once(data):
    loop = make_loop(SETTINGS, data)
    trained = train(SETTINGS, data, loop, None, 1)
    annealing = arms.REFRESH_STEPS * HMC2.kernel().evaluations_per_step
    assert trained.started.gradient_evaluations == 2 * START.updates + annealing
    updates = 4 * pulls_per_update("weighted", HMC2)
    assert loop.cost()["gradient_evaluations"] == trained.started.gradient_evaluations + updates
    assert trained.fit.updates == 4 and trained.fit.seconds > trained.started.seconds
    untouched = make_loop(SETTINGS, data)
    untouched.step()
    StartByScores(SETTINGS, data.standardised()[0], 1).begin(Fit(untouched))  # of a run that is under way
    assert untouched.cost()["gradient_evaluations"] == updates / 4
    assert train(dataclasses.replace(SETTINGS, start=None), data, make_loop(SETTINGS, data), None, 1).started is None


def ended(data, path):
    """What training in a folder ends with, without seconds."""
    loop = make_loop(SETTINGS, data)
    trained = train(SETTINGS, data, loop, RunDirectory(path), 1)
    rows = [RunDirectory(folder).read_metrics() for folder in (path, path / "start")]
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    return trained, (dataclasses.replace(trained.started, seconds=0.0) if trained.started else None), rows


def same(one, other):
    assert one[1:] == other[1:]
    states = (trained.loop.state_dict() for trained, *_ in (one, other))
    left, right = ({**s["model"], **s["weighted_state"]} for s in states)
    assert all(v is w or torch.equal(v, w) for v, w in ((left[k], right[k]) for k in left))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return ended(data, tmp_path_factory.mktemp("whole") / "run")


def stopping(monkeypatch, loop, at):
    """A signal in the step after `at` of them."""
    step = loop.step

    def interrupting(self):
        if self.iteration == at:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(loop, "step", interrupting)


def test_interrupted_within_the_start_it_continues_to_the_bit(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopping(patched, ScoreMatching, 2)
        with pytest.raises(KeyboardInterrupt):
            ended(data, tmp_path / "run")
    assert RunDirectory(tmp_path / "run" / "start").read_checkpoint().number == 3
    assert RunDirectory(tmp_path / "run").read_checkpoint().number == 0
    same(ended(data, tmp_path / "run"), whole)


def test_interrupted_after_the_start_it_makes_no_other(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopping(patched, Single, 1)
        trained, *_ = ended(data, tmp_path / "run")
        assert trained.fit.stopped == "interrupted" and trained.fit.updates == 2
    with monkeypatch.context() as patched:
        patched.setattr(by_scores, "ScoreMatching", None)
        same(ended(data, tmp_path / "run"), whole)


def test_killed_before_the_first_checkpoint_after_it(data, whole, tmp_path):
    ended(data, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "000004")
    same(ended(data, tmp_path / "run"), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_steps": 0}, "--start-steps must be an integer ≥ 1, got 0"),
        ({"start_noise": 0.0}, "--start-noise must be positive"),
        ({"start_noise": math.inf}, "--start-noise must be positive and finite"),
        ({"start_by": "gaussian", "start_steps": 3}, "--start-steps has no effect: --start-by gaussian"),
        ({"start_by": "gaussian", "start_noise": 0.3}, "--start-noise has no effect: --start-by gaussian"),
        ({"weighted": False}, "--start-by score-matching needs weighted particles"),
        ({"compare": True}, "--start-by has no effect: --compare begins with particles"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Config(**{"start_by": "score-matching"} | options).check()


def test_options_become_settings(data):
    config = Config(start_by="score-matching", start_steps=7)
    assert config.settings(data).start == ScoreStart(7, 0.1)
    assert config.resolved(data).start_noise == 0.1
    assert Config().settings(data).start is None and Config().resolved(data).start_steps is None


def test_the_report_and_the_last_lines_say_it(data, tmp_path, capsys):
    start = Started(7, 2.0, 164, 0.4, 1.25, 0.01, 12.0)
    judging.show(summary(start=start), tmp_path)
    said = capsys.readouterr().out
    assert "start     7 updates of score matching in 2 s; log Z 1.2500 ± 0.0100 when particles took over, 12 of" in said
    page = report._numbers(data, summary(start=start))
    assert "log Z after the start" in page and "7 updates, 164 pulls" in page
    assert "after the start" not in report._numbers(data, summary())


@pytest.mark.slow
def test_the_command_says_what_the_start_was_and_resumes_within_it(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})
    words = ["ebm", "--data", str(file), *SHORT, "--start-steps", "6"]
    assert cli.main([*words, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        stopping(patched, ScoreMatching, 3)
        assert cli.main([*words, "--out", str(tmp_path / "run")]) == 130
    assert f"implicit-diffusion resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 2  # not begun anew over what there is
    assert "resume" in capsys.readouterr().err
    assert cli.main(["resume", str(tmp_path / "run" / "start")]) == 2
    assert f"is part of a run; name the run itself, {tmp_path / 'run'}" in capsys.readouterr().err
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run")]
    for each in summaries:
        del each["seconds"], each["start"]["seconds"]
    assert summaries[0] == summaries[1] and summaries[0]["start"]["updates"] == 6
    assert "started by 6 updates of score matching" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_images_start_by_scores_too(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})
    np.save(tmp_path / "images.npy", Noise(0).normal((60, 1, 4, 4)).numpy())
    words = ["--data", str(tmp_path / "images.npy"), *SHORT, "--start-steps", "3", "--out", str(tmp_path / "run")]
    assert cli.main(["ebm", *words]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["start"]["updates"] == 3
