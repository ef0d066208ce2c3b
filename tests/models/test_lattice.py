"""Discrete data: their spacing is found, noise fills the gaps, and the likelihood is a lower bound that is known."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm import judging
from implicit_diffusion.commands.ebm.data import GREY, discrete, load_data
from implicit_diffusion.commands.score import command as score
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.energy_model import load_energy_model
from implicit_diffusion.models.lattice import Lattice, find_lattice
from implicit_diffusion.noise import Noise
from tests.helpers.energy_models import TINY, gaussian

RNG = np.random.default_rng(0)
LATTICES = {
    "bits": (RNG.integers(0, 2, (50, 1)), 1.0),
    "counts": (RNG.poisson(3, (400, 1)), 1.0),
    "integers with gaps": (RNG.choice([0, 2, 5], (60, 1)), 1.0),
    "even ones": (RNG.choice([0, 2, 4, 10], (60, 1)), 2.0),
    "tenths": (np.round(RNG.normal(5, 1, (300, 1)), 1), 0.1),
    "thirds": (RNG.integers(-4, 4, (60, 1)) / 3, 1 / 3),
    "grey levels in single precision": ((RNG.integers(0, 256, (2000, 1)) / np.float32(255)), 1 / 255),
    "grey levels in [-1, 1]": ((RNG.integers(0, 256, (2000, 1)) / np.float32(127.5) - 1), 2 / 255),
    "seconds since 1970": (1.7e9 + RNG.integers(0, 50, (100, 1)), 1.0),
    "few integers of a wide range": (np.arange(20)[:, None] % 7 * 12.0, 12.0),
}


@pytest.mark.parametrize("what", LATTICES)
def test_the_spacing_is_found(what):
    x, spacing = LATTICES[what]
    lattice = find_lattice(torch.from_numpy(x.astype("float32" if x.dtype == np.float32 else "float64")))
    assert lattice is not None and lattice.spacing.item() == pytest.approx(spacing, rel=1e-6)
    assert lattice.offset.item() == pytest.approx(x.min())


CONTINUA = {
    "normal": RNG.standard_normal((3000, 1)),
    "normal in single precision": RNG.standard_normal((3000, 1)).astype("float32"),
    "few": RNG.standard_normal((10, 1)),
    "uniform far from zero": 1e5 + RNG.random((500, 1)),
    "prices, nearly all different": np.round(RNG.lognormal(3, 1, (300, 1)), 2),
    "a heavy tail": RNG.standard_cauchy((3000, 1)),
}


@pytest.mark.parametrize("what", CONTINUA)
def test_a_continuum_is_none(what):
    assert find_lattice(torch.from_numpy(CONTINUA[what])) is None


def test_columns_have_spacings_of_their_own_and_pixels_share_one():
    x = torch.from_numpy(np.concatenate([RNG.integers(0, 9, (90, 1)), RNG.standard_normal((90, 1))], 1))
    lattice = find_lattice(x)
    assert lattice.spacing.tolist() == [1, 0] and lattice.log_volume((2,)) == 0.0
    y = lattice.dequantise(x, torch.Generator().manual_seed(0))
    assert torch.equal(y[:, 1], x[:, 1]) and torch.equal(y[:, 0].floor(), x[:, 0])
    assert torch.equal(lattice.quantise(y), x)
    images = torch.randint(256, (30, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float() / 255
    lattice = find_lattice(images)
    assert lattice.spacing.shape == (1, 1, 1) and lattice.spacing.item() == pytest.approx(1 / 255, rel=1e-6)
    assert lattice.log_volume((3, 4, 4)) == pytest.approx(-48 * math.log(255), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_fills_the_cell_above_every_value_and_is_rounded_down_again(dtype):
    """Mean ½, deviation 1/√12 of the spacing, to four errors; no sum is rounded up into the next cell."""
    x = torch.arange(0, 65536, 13, dtype=dtype)[:, None].repeat(4, 1)
    u = GREY.dequantise(x, torch.Generator().manual_seed(0)) - x
    assert (u >= 0).all() and (u < 1).all() and torch.equal(GREY.quantise(x + u), x)
    assert abs(u.mean().item() - 0.5) < 4 / math.sqrt(12 * len(u))
    assert u.std().item() == pytest.approx(12**-0.5, rel=4 / math.sqrt(2 * len(u)))
    tenths = Lattice(torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
    y = torch.arange(3, 50, dtype=torch.float64)[:, None] / 10
    torch.testing.assert_close(tenths.quantise(y), y, rtol=0, atol=1e-12)


def test_values_off_the_lattice_are_named():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.5]])
    with pytest.raises(InvalidInputError, match=r"row 1 of the data holds 4\.5, which is not 0 plus a multiple of 1"):
        GREY.dequantise(x, torch.Generator())


@pytest.mark.parametrize("spacing", [1.0, 0.25])
def test_the_bound_is_that_of_jensen(spacing):
    """A Gaussian q knows both: E_u log q(x + s u) + log s in closed form, and log P(x) = log ∫ q over the cell."""
    mean, deviation = 2.3, 1.7
    lattice = Lattice(torch.tensor([spacing]), torch.zeros(1))
    model = dataclasses.replace(gaussian((1,), torch.tensor([mean]), torch.tensor([deviation])), lattice=lattice)
    k = spacing * torch.arange(-4, 12, dtype=torch.float64)
    bound = math.log(spacing) - 0.5 * math.log(2 * math.pi * deviation**2)
    bound = bound - ((k - mean).square() + (k - mean) * spacing + spacing**2 / 3) / (2 * deviation**2)
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), deviation)
    log_p = (normal.cdf(k + spacing) - normal.cdf(k)).log()
    assert (bound < log_p).all()
    draws = torch.stack([model.log_likelihood(k[:, None], Noise(seed)) for seed in range(400)])
    error = draws.std(0) / 20
    assert ((draws.mean(0) - bound).abs() < 4 * error + 1e-6).all() and (error < 0.2).all()
    assert draws.mean() < (log_p + 4 * error).mean()


def test_a_model_of_continuous_data_scores_their_density():
    model = gaussian()
    x = Noise(0).normal((5, 2))
    assert torch.equal(model.log_likelihood(x, Noise(0)), model.log_density(x))


@pytest.fixture
def counts(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(1).poisson([2.0, 9.0], (300, 2)).astype("int16"))
    return str(tmp_path / "x.npy")


@pytest.mark.slow
def test_a_run_that_dequantises(counts, tmp_path, monkeypatch, capsys):
    """Its likelihood is a bound below the law's own; score repeats it on the integers; sample draws integers."""
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})
    out = tmp_path / "run"
    summary = ebm.run(dataclasses.replace(TINY, data=counts, dequantise=True, out=out))
    assert "note" not in capsys.readouterr().out and not any("--dequantise" in line for line in summary["advice"])
    data = load_data(counts, Noise(0), dequantise=True)
    assert len(data.train) == 20 * len(data.once) and not torch.equal(data.train[:240], data.train[240:480])
    assert torch.equal(data.train[:240].floor(), data.train[240:480].floor())
    model = load_energy_model(out / "model")
    assert model.lattice.spacing.tolist() == [1, 1]
    integers = data.held_out.floor()
    np.save(tmp_path / "held.npy", integers.numpy().astype("int64"))
    result = score.run(score.Config(out / "model", str(tmp_path / "held.npy"), seed=3))
    assert result["log_likelihood"] == pytest.approx(-summary["nll_held_out"], abs=0.15)  # other noise
    assert "at least: a bound" in capsys.readouterr().out
    law = torch.distributions.Poisson(torch.tensor([2.0, 9.0]))
    assert result["log_likelihood"] < law.log_prob(integers).sum(1).mean().item()
    with pytest.raises(InvalidInputError, match="row 0 of the data holds"):
        np.save(tmp_path / "half.npy", integers.numpy() + 0.5)
        score.run(score.Config(out / "model", str(tmp_path / "half.npy")))
    assert cli.main(["sample", "--model", str(out / "model"), "--num", "50", "--out", str(tmp_path / "d.npy")]) == 0
    drawn = np.load(tmp_path / "d.npy")
    assert np.array_equal(drawn, np.round(drawn)) and len(np.unique(drawn)) > 5


def test_a_run_on_discrete_data_says_so(counts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judging, "PARTICLES", {"vectors": 64, "images": 64})
    summary = ebm.run(dataclasses.replace(TINY, data=counts, steps=4, out=tmp_path / "run"))
    said = capsys.readouterr().out
    assert "note      columns x1, x2 hold multiples of 1: a density may pile up" in said and "--dequantise" in said
    assert any("--dequantise" in line for line in summary["advice"])
    assert load_energy_model(tmp_path / "run" / "model").lattice is None


def test_what_is_said_of_discrete_data(tmp_path):
    (tmp_path / "x.csv").write_text("count,x\n" + "".join(f"{k},{v}\n" for k, v in zip(range(40), RNG.random(40))))
    assert "columns count hold multiples of 1:" in discrete(load_data(str(tmp_path / "x.csv"), Noise(0)))
    assert discrete(load_data("moons", Noise(0))) is None and discrete(load_data("digits", Noise(0))) is None
    np.save(tmp_path / "y.npy", RNG.random((40, 2)))
    with pytest.raises(InvalidInputError, match=r"--dequantise has no effect: .* lie on no lattice"):
        load_data(str(tmp_path / "y.npy"), Noise(0), dequantise=True)
    for name in ("moons", "digits"):
        with pytest.raises(InvalidInputError, match=f"--dequantise has no effect: --data {name}"):
            ebm.run(ebm.Config(name, dequantise=True))


def test_a_lattice_that_is_none_is_refused(tmp_path):
    model = dataclasses.replace(gaussian(), lattice=Lattice(torch.tensor([-1.0, 1.0]), torch.zeros(2)))
    model.save(tmp_path / "model")
    with pytest.raises(InvalidInputError, match="the spacing of its lattice must not be negative"):
        load_energy_model(tmp_path / "model")
