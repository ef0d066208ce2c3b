"""What is said of a trained energy-based model: whether log Z may be believed, what to change, and its picture."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm import figures, judging
from implicit_diffusion.commands.ebm.arms import Settings, make_loop, to_model
from implicit_diffusion.commands.ebm.config import Config, defaults_table
from implicit_diffusion.commands.ebm.data import Data, load_data
from implicit_diffusion.commands.ebm.training import Trained
from implicit_diffusion.loops.diagnostics import WORDS
from implicit_diffusion.models.energy_model import Architecture, Moves, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import Fit
from tests.helpers.energy_models import SMALL, TINY, gaussian, summary


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})


@pytest.fixture(scope="module")
def trained():
    data = load_data("eight-gaussians", Noise(0))
    settings = Settings(Architecture("mlp", (2,), 8), Moves("hmc", 0.06, 4), "weighted", 32, 1, 1e-3, 0)
    loop = make_loop(settings, data)
    return Trained(settings, Fit(loop, loop.step()), loop, to_model(settings, loop, data), [])


def estimates(half, error, **changes):
    numbers = {"log_z_estimate": 45.8, "log_z_estimate_se": 0.5, "log_z_half": half, "log_z_half_se": error}
    return summary(**numbers | {"ess": 32.0} | changes)


def test_annealing_that_has_not_arrived_is_said(trained):
    def say(numbers):
        return [line for line in judging.what_to_change(trained, numbers, step_size_given=False) if "log Z" in line]

    (line,) = say(estimates(43.0, 0.6))
    assert "log Z rises from 43 to 45.8 ± 0.78" in line and "--judge-steps" in line
    assert (
        say(estimates(44.5, 0.6)) == [] and say(estimates(48.0, 0.6)) == []
    )  # within the errors; too low is what it errs
    assert say(estimates(43.0, 0.6, log_z=46.0)) == []  # the exact one is known, and used


def test_advice_is_in_options_and_not_on_untouched_defaults(trained):
    """A network of zeros accepts every proposal of the default step size, which is meant for a trained one."""
    assert float(trained.fit.metrics["acceptance"]) > 0.98
    changed, untouched = (
        [
            line
            for line in judging.what_to_change(trained, estimates(45.0, 0.6), step_size_given=given)
            if "accepted" in line
        ]
        for given in (True, False)
    )
    assert untouched == [] and "larger --step-size" in changed[0] and "warm_up" not in changed[0]
    few = judging.what_to_change(trained, estimates(45.0, 0.6, ess=2.0), step_size_given=False)
    assert "a smaller --lr or more --particles" in few[0]
    assert WORDS.keys() == judging.WORDS.keys()


def test_annealing_shows_how_far_it_is_and_the_model_is_saved_before_it(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((60, 1, 4, 4)))
    annealed, models = judging.annealed, []

    def look(*arguments, **options):
        models.append(load_energy_model(tmp_path / "run" / "model").potential.state_dict())
        return annealed(*arguments, **options)

    monkeypatch.setattr(judging, "annealed", look)
    config = Config(str(tmp_path / "x.npy"), steps=3, particles=16, lr=0.01, **SMALL, out=tmp_path / "run")
    result = ebm.run(config)
    said = capsys.readouterr()
    assert "annealing  20/20 (100 %)" in said.err and "annealing, half as long  10/10 (100 %)" in said.err
    assert "at half the steps" in said.out and result["log_z_half_se"] > 0
    assert "long chains" not in said.err and "chain_steps" not in result
    final = load_energy_model(tmp_path / "run" / "model").potential.state_dict()
    assert len(models) == 2 and all(torch.equal(models[0][name], final[name]) for name in final)


def test_progress_names_the_sampler(tmp_path, capsys):
    options = ["--sampler", "ula", "--no-weighted", "--steps", "2", "--particles", "16", "--judge-steps", "4"]
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((60, 2)))  # no law to compare with
    assert cli.main(["ebm", "--data", str(tmp_path / "x.npy"), *options, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "ula  2/2" in said and "hmc" not in said


@pytest.mark.parametrize(("shift", "scale"), [((300.0, -2.0), (50.0, 0.1)), ((5.0, 5.0), (1.0, 0.7))], ids=str)
def test_the_picture_of_ones_own_plane_is_where_the_data_are(shift, scale, tmp_path, monkeypatch):
    """Far from the origin, in units of their own: the axes hold the data, and the densities' pixels sum to one."""
    shift, scale = torch.tensor(shift), torch.tensor(scale)
    x = Noise(0).normal((400, 2)) * scale + shift
    drawn = []
    monkeypatch.setattr(figures, "finish_figure", lambda figure, path, gridded=(): drawn.append(figure))
    model = gaussian(shift=shift, scale=scale)
    figures.draw(model, Data(x[:300], x[300:], shift, scale), summary(), RunDirectory(tmp_path))
    density = drawn[0].axes[0]
    for (low, high), centre, deviation in zip((density.get_xlim(), density.get_ylim()), shift, scale):
        assert low == pytest.approx((centre - (high - centre)).item(), rel=1e-4)
        assert 3 * deviation < high - centre <= 4.001 * deviation
    pixels = density.images[0].get_array()
    (left, right), (bottom, top) = density.get_xlim(), density.get_ylim()
    assert pixels.sum() * (right - left) * (top - bottom) / pixels.size == pytest.approx(1, abs=5e-3)
    assert density.get_aspect() == ("auto" if scale[0] > 3 * scale[1] else 1)


def test_the_error_of_the_held_out_likelihood_covers(monkeypatch, as_users_run):
    """Over 200 replicates of 50 data and of log Z, whose own error is as large: each alone would be 0.7 of it."""
    error, results = 0.14, []
    draws = torch.Generator().manual_seed(0)
    model = gaussian(shift=torch.zeros(2), scale=torch.ones(2))
    loop = SimpleNamespace(cost=lambda: {"gradient_evaluations": 0}, weighted=False)
    trained = Trained(Settings(*6 * (None,), seed=0), SimpleNamespace(seconds=0.0, updates=0), loop, model, [])
    for _ in range(200):
        data = Data(x := torch.randn(50, 2, generator=draws), x, torch.zeros(2), torch.ones(2))
        log_z = model.log_z + error * torch.randn((), generator=draws).item()
        monkeypatch.setattr(judging, "log_z_by_annealing", lambda *arguments, log_z=log_z: (log_z, error))
        judged = judging.judge(trained, data, 2)
        results.append((judged.nll_held_out, judged.nll_held_out_se))
    values, errors = torch.tensor(results, dtype=torch.float64).unbind(1)
    assert 0.8 < errors.mean() / values.std() < 1.2  # the spread is known to 5 %
    assert abs(values.mean() - (math.log(2 * math.pi) + 1)) < 4 * values.std() / 200**0.5


def test_the_table_of_defaults_is_the_documented_one():
    page = Path(__file__).parents[3] / "docs" / "howto" / "ebm.md"
    assert defaults_table() in page.read_text(encoding="utf-8")
    assert dataclasses.replace(TINY, judge_steps=None).resolved(load_data("moons", Noise(0))).judge_steps == 200
