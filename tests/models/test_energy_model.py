"""Energy-based models on disk: bitwise round trips, densities against closed forms, and what is refused."""

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.score import command as score
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.models.energy_model import Architecture, EnergyModel, Moves, load_energy_model
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped
from tests.helpers.energy_models import SCALE, SHIFT, bent, gaussian


def bits(x):
    return x.detach().numpy().tobytes()


def conv_model():
    event = (1, 4, 4)
    scale = 0.5 + torch.rand(event, generator=Noise(3).generator(0))
    return gaussian(event, torch.zeros(event), scale, kind="conv")


MODELS = {"plane": bent, "images": conv_model, "no log Z": lambda: EnergyModel(*list(vars(gaussian()).values())[:6])}


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_exact(name, tmp_path):
    model = MODELS[name]()
    model.save(tmp_path / "deep" / "model")
    loaded = load_energy_model(tmp_path / "deep" / "model")
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == ["model.json", "model.safetensors"]
    assert loaded.architecture == model.architecture and loaded.moves == model.moves
    assert (loaded.log_z, loaded.log_z_se) == (model.log_z, model.log_z_se)
    for part in ("shift", "scale", "particles"):
        assert bits(getattr(loaded, part)) == bits(getattr(model, part))
    ours, theirs = model.potential.state_dict(), loaded.potential.state_dict()
    assert ours.keys() == theirs.keys() and all(bits(ours[k]) == bits(theirs[k]) for k in ours)
    assert not loaded.potential.training and not any(p.requires_grad for p in loaded.potential.parameters())
    x = model.particles * model.scale + model.shift
    assert torch.equal(model.potential(model.particles), loaded.potential(model.particles))
    if model.log_z is not None:
        assert torch.equal(model.log_density(x), loaded.log_density(x))


def test_a_model_that_is_saved_again_replaces_the_old_one(tmp_path):
    gaussian().save(tmp_path)
    bent().save(tmp_path)
    assert load_energy_model(tmp_path).log_z == bent().log_z


def test_nothing_is_a_pickle(tmp_path):
    bent().save(tmp_path)
    said = json.loads((tmp_path / "model.json").read_text())
    assert said["format"] == "implicit-diffusion energy model"
    header = (tmp_path / "model.safetensors").read_bytes()[8:9]
    assert header == b"{"  # a JSON header, then raw numbers


@pytest.mark.parametrize("event", [(3,), (1, 4, 4)])
def test_densities_of_a_gaussian(event):
    """Log N(x; shift, diag(scale²)) per unit of the data's volume: −V − log Z − Σ log scale."""
    shift = Noise(4).normal(event)
    scale = 0.2 + Noise(4).normal(event, 1).abs()
    model = gaussian(event, shift, scale, kind="mlp" if len(event) == 1 else "conv")
    x = shift + 2 * scale * Noise(5).normal((40, *event))
    expected = torch.distributions.Normal(shift.double(), scale.double()).log_prob(x.double()).flatten(1).sum(1)
    values = model.log_density(x)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=2e-5)  # V in single precision


def test_a_scale_shared_by_all_coordinates_counts_for_each():
    model = gaussian((3,), torch.zeros(3), torch.tensor([2.0]))
    expected = -3 * math.log(2 * math.sqrt(2 * math.pi))
    assert model.log_density(torch.zeros(1, 3)).item() == pytest.approx(expected, rel=1e-6)


def test_a_density_on_the_plane_integrates_to_one():
    model = bent()
    quadrature = Quadrature(torch.zeros(2), torch.ones(2))
    log_p = model.log_density(quadrature.grid.points.float())
    assert log_p.exp().sum().item() * quadrature.grid.area == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(log_p, Quadrature(SHIFT, SCALE).log_density(model.potential)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ula", "mala", "underdamped", "hmc"])
def test_draws_are_the_models_and_replay(sampler):
    model = bent(moves=Moves(sampler, {"ula": 0.05, "mala": 0.2}.get(sampler, 0.4), 2))
    draws = model.sample(3000, Noise(6), steps=40)
    assert draws.shape == (3000, 2)
    assert torch.equal(draws, model.sample(3000, Noise(6), steps=40))
    assert not torch.equal(draws, model.sample(3000, Noise(7), steps=40))
    quadrature = Quadrature(model.shift, model.scale)
    p = quadrature.log_density(model.potential)[0].exp() * quadrature.grid.area
    for i in range(2):
        mean, error = (p @ quadrature.grid.points[:, i]).item(), draws[:, i].std().item() / math.sqrt(3000)
        bias = 0.02 if sampler in ("ula", "underdamped") else 0.005
        assert abs(draws[:, i].mean().item() - mean) < 4 * error + bias


def test_kernels_by_name():
    for name, kind in {"ula": ULA, "mala": MALA, "underdamped": Underdamped, "hmc": HMC}.items():
        kernel = Moves(name, 0.3, 7).kernel()
        assert type(kernel) is kind and kernel.step_size_at(0) == 0.3
    assert kernel.leapfrogs == 7


def change(folder, **said):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def without(folder, name):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")


def spoil(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")


def squeeze(folder, name, shape):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(shape)}, folder / "model.safetensors")


DAMAGE = {
    "no description": lambda f: (f / "model.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "half of the weights": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:500]
    ),
    "weights that are none": lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickled"),
    "no JSON": lambda f: (f / "model.json").write_text("{"),
    "a list": lambda f: (f / "model.json").write_text("[1]"),
    "another format": lambda f: change(f, format="diffusers"),
    "another width": lambda f: change(f, architecture={"kind": "mlp", "event_shape": [2], "width": 9, "depth": 2}),
    "a width beyond all memory": lambda f: change(
        f, architecture={"kind": "mlp", "event_shape": [2], "width": 10**9, "depth": 2}
    ),
    "a depth beyond all time": lambda f: change(
        f, architecture={"kind": "mlp", "event_shape": [2], "width": 8, "depth": 10**9}
    ),
    "JSON without an end to its depth": lambda f: (f / "model.json").write_text('{"a":' * 10**5 + "1" + "}" * 10**5),
    "an unknown sampler": lambda f: change(f, moves={"sampler": "gibbs", "step_size": 0.1}),
    "an unknown architecture": lambda f: change(
        f, architecture={"kind": "x", "event_shape": [2], "width": 8, "depth": 2}
    ),
    "a negative step": lambda f: change(f, moves={"sampler": "hmc", "step_size": -0.1, "leapfrogs": 3}),
    "log Z that is NaN": lambda f: change(f, log_z=math.nan),
    "an error of log Z that is NaN": lambda f: change(f, log_z_se=math.nan),
    "a weight that is NaN": lambda f: spoil(f, "potential.network.0.weight", math.nan),
    "a particle at infinity": lambda f: spoil(f, "particles", math.inf),
    "a shift that is NaN": lambda f: spoil(f, "shift", math.nan),
    "a scale of nothing": lambda f: spoil(f, "scale", 0.0),
    "a negative scale": lambda f: spoil(f, "scale", -1.0),
    "log Z that is a word": lambda f: change(f, log_z="large"),
    "no shift": lambda f: without(f, "shift"),
    "no particles": lambda f: without(f, "particles"),
    "a layer that is missing": lambda f: without(f, "potential.network.0.weight"),
    "particles of another shape": lambda f: squeeze(f, "particles", (64, 3)),
    "a scale of another shape": lambda f: squeeze(f, "scale", (3,)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_and_foreign_folders_are_refused_by_name(what, tmp_path):
    gaussian().save(tmp_path / "model")
    DAMAGE[what](tmp_path / "model")
    with pytest.raises(InvalidInputError, match=f"{tmp_path / 'model'} "):
        load_energy_model(tmp_path / "model")


def test_folders_that_are_not_there(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InvalidInputError, match=r"holds no model.json; give the model/ folder"):
            load_energy_model(path)


def test_what_has_no_density():
    model = MODELS["no log Z"]()
    with pytest.raises(InvalidInputError, match="does not know its log Z"):
        model.log_density(torch.zeros(3, 2))
    with pytest.raises(InvalidInputError, match=r"data have event shape \(3,\), the model \(2,\); they must agree"):
        gaussian().log_density(torch.zeros(3, 3))
    with pytest.raises(InvalidInputError, match=r"potential: mlp needs vectors, got events \(1, 4, 4\); use conv"):
        Architecture("mlp", (1, 4, 4), 8).build(Noise(0))


def test_score_agrees_with_the_density_and_with_quadrature(tmp_path, capsys):
    """Under draws from itself the mean log-likelihood is minus the entropy."""
    model = bent()
    model.save(tmp_path / "model")
    x = model.sample(4000, Noise(8), steps=30)
    np.save(tmp_path / "x.npy", x.numpy())
    result = score.run(score.Config(tmp_path / "model", str(tmp_path / "x.npy"), tmp_path / "deep" / "scores.npy"))
    scores = np.load(tmp_path / "deep" / "scores.npy", allow_pickle=False)
    assert np.array_equal(scores, model.log_density(x).numpy())
    assert result["log_likelihood"] == pytest.approx(scores.mean()) and result["data"] == 4000
    assert result["standard_error"] == pytest.approx(scores.std(ddof=1) / math.sqrt(4000))
    assert result["bits_per_dimension"] == pytest.approx(-scores.mean() / 2 / math.log(2))
    quadrature = Quadrature(SHIFT, SCALE)
    log_p, _ = quadrature.log_density(model.potential)
    entropy = -(log_p.exp() @ log_p).item() * quadrature.grid.area
    assert abs(result["log_likelihood"] + entropy) < 4 * result["standard_error"]
    said = capsys.readouterr().out
    assert (
        f"{result['log_likelihood']:.4f} ± {result['standard_error']:.4f} (data)" in said
        and "bits per dimension" in said
    )


@pytest.mark.parametrize("far", [1e30, -1e38])
def test_score_names_data_without_a_finite_likelihood(far, tmp_path, capsys):
    """Their energy overflows; a mean over them would be infinite or NaN."""
    gaussian().save(tmp_path / "model")
    np.save(tmp_path / "x.npy", np.array([[0.0, 0.0], [0.1, far], [0.2, far]]))
    call = ["score", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "x.npy")]
    assert main([*call, "--out", str(tmp_path / "scores.npy")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert re.search(r"2 of 3 data have no finite log-likelihood, the first in row 1: it lies .* deviations", said.err)
    assert not (tmp_path / "scores.npy").exists()


def test_a_model_far_from_zero_scores_and_draws_in_the_precision_of_its_data(tmp_path):
    """Log N(x; shift, diag(scale²)) at 1.76e9 ± 1, where single precision has a spacing of 128."""
    shift, scale = torch.tensor([1.76e9, -5.4e6]).double(), torch.tensor([1.0, 0.5]).double()
    gaussian(shift=shift, scale=scale).save(tmp_path / "model")
    model = load_energy_model(tmp_path / "model")
    x = model.sample(200, Noise(0), steps=5)
    expected = torch.distributions.Normal(shift, scale).log_prob(x).sum(1)
    np.save(tmp_path / "x.npy", x.numpy())
    score.run(score.Config(tmp_path / "model", str(tmp_path / "x.npy"), tmp_path / "scores.npy"))
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected.numpy(), rtol=0, atol=1e-5)
    assert (x - shift).abs().max() < 10 and len(x[:, 0].unique()) > 150


def test_a_sampler_that_runs_away_is_no_draw():
    with pytest.raises(NonFiniteError, match="ula sampler ran away within 200 steps"):
        gaussian(moves=Moves("ula", 30.0)).sample(8, Noise(0))


def test_one_datum_has_no_standard_error(tmp_path):
    gaussian().save(tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((1, 2), dtype=np.float32))
    assert score.run(score.Config(tmp_path, str(tmp_path / "x.npy")))["standard_error"] is None


def test_what_score_refuses(tmp_path):
    gaussian().save(tmp_path / "model")
    np.save(tmp_path / "x.npy", np.zeros((5, 3)))
    np.save(tmp_path / "none.npy", np.zeros((0, 2)))
    data = str(tmp_path / "x.npy")
    for out in (tmp_path / "x.npy", tmp_path / "scores.txt"):
        with pytest.raises(InvalidInputError, match=r"--out .* must name a new \.npy file"):
            score.run(score.Config(tmp_path / "model", data, out))
    with pytest.raises(InvalidInputError, match="data have event shape"):
        score.run(score.Config(tmp_path / "model", data))
    with pytest.raises(InvalidInputError, match=r"holds no model\.json"):
        score.run(score.Config(tmp_path, data))
    with pytest.raises(InvalidInputError, match=r"--data .*none\.npy holds no data"):
        score.run(score.Config(tmp_path / "model", str(tmp_path / "none.npy"), tmp_path / "scores.npy"))
    with pytest.raises(InvalidInputError, match=r"--data moons: no such file"):
        score.run(score.Config(tmp_path / "model", "moons"))
    assert not (tmp_path / "scores.npy").exists()


def test_a_flipped_bit_in_the_weights_is_noticed_and_weights_without_checksums_load(tmp_path):
    bent().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for place in (-1, -17, -100):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        weights.write_bytes(spoilt)
        with pytest.raises(InvalidInputError, match=r"is damaged.* checksum differs"):
            load_energy_model(tmp_path)
    weights.write_bytes(whole)
    save_file(load_file(weights), weights)  # as an earlier release wrote them
    assert load_energy_model(tmp_path).log_z == bent().log_z
