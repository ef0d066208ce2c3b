"""Reward training of an energy-based model: the optimum in closed form, training towards it, and what is refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.commands import resuming
from implicit_diffusion.commands.tilt import command as tilt
from implicit_diffusion.commands.tilt import training
from implicit_diffusion.commands.tilt.config import ARMS
from implicit_diffusion.commands.tilt.exact import ExactTilt, Tradeoff, half_plane
from implicit_diffusion.commands.tilt.summary import Row, Summary, over_seeds, show
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.models.energy_model import Moves, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.runs import RunDirectory
from tests.helpers.energy_models import bent, gaussian

TINY = tilt.Config(Path("model"), kl_weights=(0.25, 1.0), steps=40, particles=64, lr=2e-2, seeds=2)


def test_the_optimum_of_the_half_plane_is_a_closed_form():
    """With mass m of the half plane: E R = m e^{1/w}/(1 − m + m e^{1/w}), value −w log(1 − m + m e^{1/w})."""
    model = gaussian()
    exact, cut = ExactTilt(model, half_plane), -model.shift[0].item() / model.scale[0].item()
    m = 1 - (1 + math.erf(cut / math.sqrt(2))) / 2
    assert exact.reward_initial == pytest.approx(m, abs=1e-4)
    for w in (0.1, 0.5, 2.0):
        optimum, total = exact.optimum(w), 1 - m + m * math.exp(1 / w)
        reward = m * math.exp(1 / w) / total
        assert optimum.reward == pytest.approx(reward, abs=2e-4)
        assert optimum.objective == pytest.approx(-w * math.log(total), abs=2e-4)
        assert optimum.kl == pytest.approx(reward / w - math.log(total), abs=2e-3)
    start = exact.judge(model, 0.5)
    assert start.kl == pytest.approx(0, abs=1e-12) and start.at_edge < 1e-9
    assert start.objective == pytest.approx(-exact.reward_initial)


def test_the_optimum_is_one():
    """No law in between, and none beyond, is better; as a reward that is linear shifts a Gaussian by s²/w."""
    model = gaussian()
    exact, w = ExactTilt(model, lambda x: x[:, 1]), 2.0
    variance = model.scale[1].item() ** 2
    optimum = exact.optimum(w)
    assert optimum.reward == pytest.approx(model.shift[1].item() + variance / w, abs=1e-4)
    assert optimum.kl == pytest.approx(variance / w**2 / 2, abs=1e-4)
    for other in (1.8, 2.2):
        beside = exact.optimum(other)
        assert w * beside.kl - beside.reward > optimum.objective


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [True, False])
def test_training_begins_at_the_model(weighted):
    model = bent()
    exact, particles = ExactTilt(model, half_plane), training.at_model(model, 4000, Noise(0))
    particles = particles if weighted else training.resampled(particles, Noise(0))
    assert (particles.log_weights is not None) == weighted and particles.log_z is None
    reward = particles.mean(half_plane(particles.x * model.scale + model.shift)).item()
    assert (
        abs(reward - exact.reward_initial) < 4 * 0.5 / math.sqrt(4000) * 1.5
    )  # resampled particles are not independent


def test_a_tiny_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "ANNEALING", 20)
    model = bent()
    model.save(tmp_path / "model")
    out = tmp_path / "run"
    config = dataclasses.replace(TINY, model=tmp_path / "model", out=out)
    summary = tilt.run(config)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert [row["kl_weight"] for row in summary["rows"]] == [0.25, 1.0]
    m = summary["reward_initial"]
    for row in summary["rows"]:
        w = row["kl_weight"]
        value = -w * math.log(1 - m + m * math.exp(1 / w))
        assert row["optimum"]["objective"] == pytest.approx(value, abs=1e-6)
        for arm in ARMS:
            assert value - 1e-9 <= row[arm]["objective"] and row[arm]["kl"] > 0
            assert row[arm]["reward_std"] >= 0
    gained = [-m - summary["rows"][0][arm]["objective"] for arm in ARMS]
    possible = -m - summary["rows"][0]["optimum"]["objective"]
    assert min(gained) > 0.3 * possible  # training improves what it says it does
    assert len(RunDirectory(out).read_metrics()) == 2 * 2 * 2
    assert {path.name for path in (out / "model").iterdir()} == {"w-0.25", "w-1"}
    assert (out / "figures" / "tilt.png").exists() and "before training" in capsys.readouterr().out


def test_the_model_itself_is_left_alone(monkeypatch):
    monkeypatch.setattr(training, "ANNEALING", 5)
    model = bent()
    before = {k: v.clone() for k, v in model.potential.state_dict().items()}
    start = training.at_model(model, 64, Noise(1))
    spec = training.TiltRun(0.5, weighted=True, steps=3, lr=2e-2, seed=1)
    trained = [training.train(spec, model, start, half_plane) for _ in range(2)]
    first, again = (each.potential for each in trained)
    assert all(torch.equal(v, before[k]) for k, v in model.potential.state_dict().items())
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.network[-1].weight, model.potential.network[-1].weight)


@pytest.mark.slow
def test_the_model_that_is_kept(tmp_path, monkeypatch, capsys):
    """Of the only arm and the first seed: `score` and `sample` know it, by its exact log Z, and annealing ran once."""
    calls = []
    anneal = training.annealed
    monkeypatch.setattr(training, "ANNEALING", 5)
    monkeypatch.setattr(training, "annealed", lambda *args, **options: calls.append(1) or anneal(*args, **options))
    bent().save(tmp_path / "model")
    config = dataclasses.replace(TINY, model=tmp_path / "model", arms=("unweighted",), out=tmp_path / "run")
    summary = tilt.run(config)
    assert len(calls) == 2  # two seeds; two weights share them
    assert "weighted" not in summary["rows"][0] and "unweighted" in capsys.readouterr().out
    kept = load_energy_model(tmp_path / "run" / "model" / "w-0.25")
    quadrature = Quadrature(kept.shift, kept.scale)
    density, log_z = quadrature.log_density(kept.potential)
    assert (kept.log_z, kept.log_z_se) == (pytest.approx(log_z, abs=1e-6), 0.0)
    first = [m for m in RunDirectory(tmp_path / "run").read_metrics() if m["kl_weight"] == 0.25 and m["seed"] == 0]
    reward = (density.exp() @ half_plane(quadrature.grid.points)).item() * quadrature.grid.area
    assert [m["reward"] for m in first] == [pytest.approx(reward, abs=1e-6)]
    points = Noise(5).normal((20, 2))
    np.save(tmp_path / "x.npy", points.numpy())
    folder = str(tmp_path / "run" / "model" / "w-0.25")
    assert cli.main(["score", "--model", folder, "--data", str(tmp_path / "x.npy")]) == 0
    assert cli.main(["sample", "--model", folder, "--num", "8", "--out", str(tmp_path / "draws.npy")]) == 0
    draws = torch.from_numpy(np.load(tmp_path / "draws.npy"))
    assert draws.shape == (8, 2) and draws.isfinite().all()


def test_an_optimum_beyond_the_grid_is_refused_before_training(tmp_path):
    """A reward x_1 shifts the Gaussian by s²/w: to 9.4 at w = 0.04, which the grid would have cut to 7.9."""
    gaussian().save(tmp_path / "model")
    (tmp_path / "mine.py").write_text("def right(x): return x[:, 0]\n")
    config = dataclasses.replace(TINY, model=tmp_path / "model", reward=f"{tmp_path}/mine.py:right")
    with pytest.raises(InvalidInputError, match=r"--kl-weights 0.04: the optimum has .* of its mass at the edge"):
        tilt.run(dataclasses.replace(config, kl_weights=(1.0, 0.04), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert ExactTilt(gaussian(), lambda x: x[:, 0]).optimum(0.1).reward == pytest.approx(0.4 + 3.6, abs=1e-4)


def test_a_trained_model_beyond_the_grid_is_said(tmp_path, capsys):
    model = gaussian()
    pull = torch.nn.Linear(2, 1, bias=False)
    pull.weight.data = torch.tensor([[-12.0, 0.0]])  # z_1 ~ N(12, 1), so x_1 ~ N(7.6, 0.6²) and the grid ends at 8
    gone = ExactTilt(model, half_plane).judge(dataclasses.replace(model, potential=Tilted(pull, (2,))), 1.0)
    assert gone.at_edge > 0.01
    row = Row(1.0, Tradeoff(1.0, 0.0, 0.0), weighted=over_seeds([gone]))
    show(Summary(0.5, [row], []), "weighted", RunDirectory(tmp_path))
    assert "of its mass is at the edge of the grid" in capsys.readouterr().out


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ANNEALING", 5)
    gaussian().save(tmp_path / "model")
    (tmp_path / "mine.py").write_text(
        "import numpy, torch\ndef up(x): return torch.from_numpy(numpy.sign(x.numpy()[:, 1]))\n"
    )
    config = dataclasses.replace(TINY, model=tmp_path / "model", steps=2, seeds=1, reward=f"{tmp_path}/mine.py:up")
    row = tilt.run(dataclasses.replace(config, kl_weights=(1.0,), out=tmp_path / "run"))["rows"][0]
    assert row["weighted"]["reward_std"] is None and row["optimum"]["reward"] > row["weighted"]["reward"]
    figure = tmp_path / "run" / "figures" / "tilt.png"
    drawn = figure.read_bytes()
    for gone in (tmp_path / "model", figure, tmp_path / "mine.py"):  # neither is needed to draw it again
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert resuming.report(tmp_path / "run")["rows"] == [row]
    assert figure.read_bytes() == drawn


BAD = {
    "--steps": {"steps": 0},
    "--particles must be an integer": {"particles": 8},
    "--particles must be a multiple of 8": {"particles": 20},
    "--seeds": {"seeds": 0},
    "--kl-weights": {"kl_weights": ()},
    "--kl-weights must": {"kl_weights": (1.0, 0.0)},
    "--lr": {"lr": math.nan},
    "--arms": {"arms": ()},
    "--arms must be": {"arms": ("weighted", "weighted")},
    "neither": {"reward": "half"},
    "shipped rewards are of images": {"reward": "brightness"},
    "there is no file": {"reward": "nowhere.py:f"},
}
WRONG = {
    r"reward must return one number per sample, shape \(\d+,\) for input \(\d+, 2\), got \(\d+, 2\)": "both",
    r"--reward must return .* got NaN or infinity at \d+ points": "nan",
    r"--reward must return .* got torch.bool": "boolean",
    r"reward mixes samples": "centred",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_named_and_leave_no_folder(message, tmp_path):
    gaussian().save(tmp_path / "model")
    with pytest.raises(InvalidInputError, match=message):
        tilt.run(dataclasses.replace(TINY, model=tmp_path / "model", out=tmp_path / "run", **BAD[message]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("message", WRONG)
def test_rewards_that_do_not_fit(message, tmp_path):
    gaussian().save(tmp_path / "model")
    (tmp_path / "bad.py").write_text(
        "def both(x): return x\ndef nan(x): return (x[:, 0] - 99).log()\n"
        "def boolean(x): return x[:, 0] > 0\ndef centred(x): return (x - x.mean(0))[:, 0]\n"
    )
    config = dataclasses.replace(TINY, model=tmp_path / "model", out=tmp_path / "run")
    with pytest.raises(InvalidInputError, match=message):
        tilt.run(dataclasses.replace(config, reward=f"{tmp_path}/bad.py:{WRONG[message]}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "form", [lambda x: x[:, :1], lambda x: x[:, 0].numpy(), lambda x: (x[:, 0].tolist(), {"beside": 1})]
)
def test_forms_of_rewards_are_one_reward(form):
    """A column, an array and a list, each has the optimum of the plain function."""
    assert ExactTilt(gaussian(), form).optimum(0.5) == ExactTilt(gaussian(), lambda x: x[:, 0]).optimum(0.5)


MODELS = {
    "a model of the plane is needed": lambda: gaussian((3,), torch.zeros(3), torch.ones(3)),
    "its sampler underdamped does not support weights": lambda: gaussian(moves=Moves("underdamped", 0.1)),
    r"the quadrature covers \[−8, 8\]²": lambda: gaussian(shift=torch.tensor([100.0, 0.0])),
    r"the quadrature covers .* in cells of 0.0625": lambda: gaussian(scale=torch.tensor([0.01, 1.0])),
}


@pytest.mark.parametrize("message", MODELS)
def test_models_that_do_not_fit(message, tmp_path):
    MODELS[message]().save(tmp_path / "model")
    with pytest.raises(InvalidInputError, match=message):
        tilt.run(dataclasses.replace(TINY, model=tmp_path / "model", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
