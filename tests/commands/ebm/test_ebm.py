"""Energy-based training end to end, small: what a run leaves behind, says, and says again with the same seed."""

import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm import digits, judging, training
from implicit_diffusion.commands.ebm.data import load_data
from implicit_diffusion.commands.score import command as score
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.loops import Single
from implicit_diffusion.models.energy_model import Architecture, Moves, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials.plane import law
from implicit_diffusion.runs import RunDirectory
from tests.helpers.energy_models import TINY, bent

KEYS = {
    "nll", "kl", "log_z", "log_z_estimate", "log_z_estimate_se", "log_z_half",
    "log_z_half_se", "mmd2", "seconds", "gradient_evaluations", "updates",
    "nll_held_out", "nll_held_out_se", "nll_train", "nll_train_se", "nll_gaussian", "nll_gaussian_se", "nll_law",
    "nll_law_se", "gain_over_gaussian", "gain_over_gaussian_se", "overfit", "overfit_se",
    "log_z_particles", "ess", "mode_masses", "mode_error", "advice",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ebm, "LOOKS", 2)
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One run, which several tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ebm, "LOOKS", 2)
        patch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})
        out = tmp_path_factory.mktemp("ebm") / "deep" / "run"
        return ebm.run(dataclasses.replace(TINY, out=out)), out


def test_a_run_leaves_what_it_says(tiny):
    summary, out = tiny
    assert summary.keys() == KEYS and json.loads((out / "summary.json").read_text()) == summary
    assert {path.name for path in (out / "figures").iterdir()} == {"density.png", "scores.png", "training.png"}
    assert {path.name for path in (out / "model").iterdir()} == {"model.json", "model.safetensors"}
    said = json.loads((out / "config.json").read_text())
    assert (said["steps"], said["width"], said["step_size"], said["data"]) == (30, 8, 0.3, "eight-gaussians")
    lines = RunDirectory(out).read_metrics()
    assert [line["updates"] for line in lines] == list(range(1, 31))
    assert [line["updates"] for line in lines if "exact_kl" in line] == [15, 30]
    assert summary["updates"] == 30
    assert summary["gradient_evaluations"] == 30 * 4 + 2 * 50 * 3  # with two refreshments
    assert 0 < summary["ess"] <= 32 and summary["log_z_estimate_se"] > 0


def test_its_figures_are_exact(tiny):
    """Against quadrature on a finer grid; the model knows its log Z, and score says the same as the summary."""
    summary, out = tiny
    model, target = load_energy_model(out / "model"), law("eight-gaussians")
    assert (model.log_z, model.log_z_se) == (summary["log_z"], 0.0)
    fine = Quadrature(model.shift, model.scale, target, half=10.0, cell=1 / 20).exact_fit(model.potential)
    for figure in ("kl", "nll", "log_z", "mode_error"):
        cut = 1e-4 if figure == "mode_error" else 1e-6  # borders between modes cut cells
        assert summary[figure] == pytest.approx(getattr(fine, figure), abs=cut)
    assert abs(summary["nll"] - summary["nll_held_out"]) < 4 * summary["nll_held_out_se"]
    assert sum(summary["mode_masses"]) == pytest.approx(1, abs=1e-6)


def test_training_improves(tiny):
    summary, out = tiny
    target = law("eight-gaussians")
    data = load_data("eight-gaussians", Noise(0))
    start = Quadrature(data.shift, data.scale, target).exact_fit(Architecture("mlp", (2,), 8).build(Noise(0)))
    assert summary["kl"] < start.kl - 0.05
    curve = [line["exact_kl"] for line in RunDirectory(out).read_metrics() if "exact_kl" in line]
    assert curve[1] < curve[0] < start.kl and curve[1] == summary["kl"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(tiny, tmp_path):
    again = ebm.run(dataclasses.replace(TINY, out=tmp_path / "again"))
    files = [(path / "model" / "model.safetensors").read_bytes() for path in (tiny[1], tmp_path / "again")]
    assert files[0] == files[1]
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in tiny[0].items() if k != "seconds"}


def interrupted(monkeypatch, *, every, at):
    """A watch that looks at multiples of `every`, and Ctrl-C after update `at`."""

    class Interrupting(training.Watch):
        def __call__(self, fit):
            self.every = every
            super().__call__(fit)
            if fit.updates == at:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "Watch", Interrupting)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_model(tiny, tmp_path, monkeypatch, capsys):
    """Ctrl-C after 17 of 30 updates, of which one drew the particles anew: model and figures agree bit for bit."""
    summary, whole = tiny
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupted(patched, every=8, at=17)
        with pytest.raises(KeyboardInterrupt, match=f"implicit-diffusion resume {out}"):
            ebm.run(dataclasses.replace(TINY, out=out))
    assert not (out / "summary.json").exists() and load_energy_model(out / "model").log_z is None
    assert cli.main(["resume", str(out)]) == 0
    files = [(path / "model" / "model.safetensors").read_bytes() for path in (whole, out)]
    assert files[0] == files[1]
    again = json.loads((out / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_last_sound_model(tmp_path, monkeypatch, capsys):
    """That of the last look, also where the resumed training fails before the next one."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupted(patched, every=8, at=17)
        with pytest.raises(KeyboardInterrupt):
            ebm.run(dataclasses.replace(TINY, out=out))
    short = dataclasses.replace(TINY, steps=30, out=tmp_path / "short")
    with monkeypatch.context() as patched:
        interrupted(patched, every=8, at=16)
        with pytest.raises(KeyboardInterrupt):
            ebm.run(short)
    kept = (out / "model" / "model.safetensors").read_bytes()
    assert kept == (short.out / "model" / "model.safetensors").read_bytes()  # of update 16, not of 17

    def fail(self):
        raise NonFiniteError("V is NaN")

    monkeypatch.setattr(Single, "step", fail)
    assert cli.main(["resume", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: V is NaN") and f"the last sound model is in {out / 'model'}" in said
    assert (out / "model" / "model.safetensors").read_bytes() == kept


def test_score_of_the_command_line(tiny, tmp_path, capsys):
    summary, out = tiny
    x = load_data("eight-gaussians", Noise(0)).held_out
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = ["--model", str(out / "model"), "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "s.npy")]
    assert cli.main(["score", *arguments]) == 0
    assert f"log-likelihood {-summary['nll_held_out']:.4f}" in capsys.readouterr().out
    model = load_energy_model(out / "model")
    assert np.array_equal(np.load(tmp_path / "s.npy"), model.log_density(x).numpy())
    log_p, _ = Quadrature(model.shift, model.scale).log_density(model.potential)
    assert np.isclose(np.load(tmp_path / "s.npy").mean(), -summary["nll"], atol=4 * summary["nll_held_out_se"])
    assert log_p.exp().sum().item() / 256 == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [*(pytest.param(each, marks=pytest.mark.slow) for each in [(1,), (3,)]), (2, 4, 4)], ids=str
)
def test_an_array_of_ones_own(shape, tmp_path):
    """No law is known: log Z by annealing, with its standard error, and nothing that would need the law."""
    np.save(tmp_path / "x.npy", 5 + 3 * np.random.default_rng(0).standard_normal((80, *shape)))
    config = dataclasses.replace(TINY, data=str(tmp_path / "x.npy"), steps=12, out=tmp_path / "run")
    summary = ebm.run(config)
    unknown = {"kl", "nll", "log_z", "mode_masses", "mode_error", "nll_law", "nll_law_se"}
    assert summary.keys() == KEYS - unknown | ({"bits_per_dimension"} if len(shape) == 3 else set())
    model = load_energy_model(tmp_path / "run" / "model")
    assert (model.log_z, model.log_z_se) == (summary["log_z_estimate"], summary["log_z_estimate_se"])
    assert model.architecture == Architecture("mlp" if len(shape) == 1 else "conv", shape, 8)
    figures = {path.name for path in (tmp_path / "run").glob("figures/*.png")}
    shown = {(1,): {"marginals"}, (3,): {"pairs"}, (2, 4, 4): {"particles", "components"}}[shape]
    assert {name.removesuffix(".png") for name in figures} == shown | {"scores", "training"}
    result = score.run(score.Config(tmp_path / "run" / "model", str(tmp_path / "x.npy")))
    assert result["log_z_standard_error"] == summary["log_z_estimate_se"]
    gaussian = -math.prod(shape) * math.log(3 * math.sqrt(2 * math.pi * math.e))
    assert abs(result["log_likelihood"] - gaussian) < 0.35 * math.prod(shape)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ula", "mala", "underdamped"])
def test_other_samplers(sampler, tmp_path):
    weighted = sampler != "underdamped"
    none = {"step_size": None, "leapfrogs": None, "refresh": 10 if weighted else None}
    changes = {"sampler": sampler, "weighted": weighted, "steps": 6, "out": tmp_path / "run"}
    summary = ebm.run(dataclasses.replace(TINY, **changes | none))
    assert ("ess" in summary) == weighted and {"kl", "log_z_estimate"} <= summary.keys()
    moves = load_energy_model(tmp_path / "run" / "model").moves
    expected = 0.06 if sampler == "underdamped" else 0.06**2
    assert moves.sampler == sampler and moves.step_size == pytest.approx(expected)


@pytest.mark.slow
def test_log_z_by_annealing_of_a_known_potential():
    """Over ten seeds the z-scores are those of Student's t with 7 degrees of freedom."""
    model, scores = bent(moves=Moves("hmc", 0.4, 2)), []
    for seed in range(10):
        estimate, error = judging.log_z_by_annealing(model, Noise(seed), 20)
        scores.append((math.exp(estimate - model.log_z) - 1) / error)
    assert abs(sum(scores) / 10) < 4 * math.sqrt(1.4 / 10) and max(map(abs, scores)) < 8


@pytest.mark.slow
def test_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "CHAINS", 8)
    monkeypatch.setattr(digits, "COMPONENTS", (2, 3))
    monkeypatch.setattr(digits, "BANDWIDTHS", (0.5,))
    out = tmp_path / "run"
    small = {"steps": 4, "particles": 16, "width": 2, "leapfrogs": 1, "judge_steps": 20}
    summary = ebm.run(ebm.Config("digits", **small, long_chains=True, out=out))
    assert summary["bits_per_dimension"] == pytest.approx(summary["nll_held_out"] / 64 / math.log(2))
    assert summary["chain_steps"] == [0, 4, 40] and len(summary["chain_energy"]) == 3
    assert summary["auroc"].keys() == {"shuffled", "uniform"} and all(0 <= a <= 1 for a in summary["auroc"].values())
    for name, chosen in (("gaussian_mixture", (2, 3)), ("kernel_density", (0.5,))):
        baseline = summary["baselines"][name]
        assert baseline["chosen"] in chosen and baseline["nll_se"] > 0
        assert baseline["bits_per_dimension"] == pytest.approx(baseline["nll"] / 64 / math.log(2))
    assert 0.5 < summary["data_confidence"] <= 1
    figures = {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert figures == {"particles", "components", "chains", "scores", "training"}


@pytest.mark.slow
def test_images_of_the_digits_size_are_not_taken_for_digits(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((40, 1, 8, 8)))
    small = {"steps": 2, "particles": 16, "width": 2, "leapfrogs": 1, "judge_steps": 20, "long_chains": True}
    summary = ebm.run(ebm.Config(str(tmp_path / "x.npy"), **small, out=tmp_path / "run"))
    assert "baselines" not in summary and "chain_confidence" not in summary and summary["chain_steps"] == [0, 2, 20]


def test_kernel_density_is_one_of_grey_levels():
    """Log-densities are per unit of the data's own volume: on Gaussian data near the Gaussian's entropy."""
    data = load_data("eight-gaussians", Noise(0))
    scale = torch.tensor([5.0, 0.2])
    x = Noise(0).normal((1500, 2)) * scale
    data = dataclasses.replace(data, train=x[:1000], held_out=x[1000:], shift=x.mean(0), scale=x.std(0), law=None)
    entropy = scale.log().sum().item() + math.log(2 * math.pi * math.e)
    for baseline in (digits._kernel_density(data), digits._mixture(data)):
        assert baseline.nll == pytest.approx(entropy, abs=4 * baseline.nll_se + 0.35)
    images = torch.arange(8.0).view(2, 1, 2, 2)
    mixed = digits.shuffled(images, Noise(0).generator(0))
    assert mixed.shape == images.shape and torch.equal(mixed.flatten(1).sort(1)[0], images.flatten(1))
    assert digits.auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
