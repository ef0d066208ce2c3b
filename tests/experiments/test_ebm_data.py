"""Data of energy-based models: shapes, standardisation, a share held out, and everything bad refused by name."""

import io

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import ebm
from implicit_diffusion.experiments.ebm_data import COPIES, dequantised, load, read_array, split
from implicit_diffusion.experiments.planar import LAWS
from implicit_diffusion.noise import Noise


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("name", LAWS)
def test_laws_come_standardised_and_independent_of_each_other(name):
    data = load(name, Noise(0))
    assert data.train.shape == (20_000, 2) and data.held_out.shape == (10_000, 2) and data.event_shape == (2,)
    assert data.law is not None and torch.equal(data.train, load(name, Noise(0)).train)
    train, held_out = data.standardised()
    assert train.mean(0).abs().max() < 1e-5 and (train.std(0) - 1).abs().max() < 1e-5
    assert held_out.mean(0).abs().max() < 0.06 and (held_out.std(0) - 1).abs().max() < 0.06
    assert not torch.equal(data.train[:10], data.held_out[:10])


def test_an_array_is_split_without_loss(tmp_path):
    array = normal(50, 3) * [1, 20, 0.1] + [0, -5, 100]
    np.save(tmp_path / "x.npy", array)
    data = load(str(tmp_path / "x.npy"), Noise(1))
    assert data.train.shape == (40, 3) and data.held_out.shape == (10, 3) and data.law is None
    both = torch.cat([data.train, data.held_out])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, array.astype(np.float32).tolist()))
    again, other = (load(str(tmp_path / "x.npy"), Noise(seed)) for seed in (1, 2))
    assert torch.equal(data.train, again.train) and not torch.equal(data.train, other.train)
    z, _ = data.standardised()
    torch.testing.assert_close(z.std(0), torch.ones(3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "uint8", "bool", ">f4"])
def test_arrays_of_any_numbers(dtype, tmp_path):
    array = (normal(20, 2) > 0).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    assert torch.equal(read_array(str(tmp_path / "x.npy")), torch.from_numpy(array.astype("float32")))


def test_pixels_that_never_change_are_kept(tmp_path):
    images = normal(30, 1, 2, 2)
    images[:, 0, 0, 0] = 7.0
    np.save(tmp_path / "x.npy", images)
    data = load(str(tmp_path / "x.npy"), Noise(0))
    assert data.event_shape == (1, 2, 2)
    assert data.scale[0, 0, 0].item() == pytest.approx(0.01 * data.scale.max().item())
    train, held_out = data.standardised()
    assert train.isfinite().all() and held_out.isfinite().all() and (train[:, 0, 0, 0].abs() < 1e-2).all()


def test_digits_are_dequantised_grey_levels():
    data = load("digits", Noise(0))
    assert data.event_shape == (1, 8, 8) and data.train.min() >= 0 and data.train.max() < 17
    assert len(data.train) / COPIES + len(data.held_out) == 1797 and data.law is None
    levels = torch.tensor([[0.0, 3.0, 16.0]]).expand(4000, 3)
    x = dequantised(levels, torch.Generator().manual_seed(0))
    assert torch.equal(x.floor(), levels) and (x - levels).std().item() == pytest.approx(12**-0.5, rel=0.05)


def save(array, **options):
    def write(path):
        np.save(path, array, **options)

    return write


def archive(path):
    buffer = io.BytesIO()
    np.savez(buffer, normal(20, 2))
    path.write_bytes(buffer.getvalue())


def with_nan(value, count=2):
    array = normal(20, 2)
    array[:count, 1] = value
    return array


def constant():
    array = normal(20, 4)
    array[:, 1], array[:, 3] = 3.0, 0.0
    return array


BAD = {
    "no file": (lambda path: None, r"no such file; give one of moons, .* digits, or FILE\.npy"),
    "NaN": (save(with_nan(np.nan)), "2 of 20 rows hold NaN or infinity; remove or impute them"),
    "infinity": (save(with_nan(np.inf, 5)), "5 of 20 rows hold NaN or infinity"),
    "beyond single precision": (save(with_nan(1e300)), "2 of 20 rows hold NaN or infinity"),
    "one row": (save(normal(1, 2)), "at least 10 rows, of which a fifth is held out, got 1"),
    "no rows": (save(normal(0, 2)), r"holds no data, got shape \(0, 2\)"),
    "no columns": (save(normal(20, 0)), r"holds no data, got shape \(20, 0\)"),
    "constant columns": (save(constant()), r"columns \[1, 3\] are constant.*leave these columns out"),
    "constant pixels": (save(np.ones((20, 1, 2, 2))), "all pixels are the same"),
    "rank 0": (save(np.float32(3)), r"must have shape \(m, d\) or \(m, channels, height, width\), got \(\)"),
    "rank 1": (save(normal(20)), r"must have shape .*got \(20,\)"),
    "rank 3": (save(normal(20, 4, 4)), r"must have shape .*got \(20, 4, 4\)"),
    "rank 5": (save(normal(20, 1, 2, 2, 2)), r"must have shape"),
    "channels last": (
        save(normal(20, 4, 5, 3)),
        r"\(20, 4, 5, 3\), which looks like \(m, height, .*transpose\(0, 3, 1, 2",
    ),
    "objects": (save(np.array([[{}, 1]] * 20, dtype=object), allow_pickle=True), "no plain .npy array.*allow_pickle"),
    "words": (save(np.array([["a", "b"]] * 20)), "must hold one array of numbers, got <U1"),
    "complex numbers": (save(normal(20, 2) * 1j), "must hold one array of numbers, got complex128"),
    "dates": (save(np.zeros((20, 2), "datetime64[D]")), "must hold one array of numbers"),
    "an archive": (archive, "must hold one array of numbers"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04\x95\x0b\x00\x00."), "no plain .npy array"),
    "an empty file": (lambda path: path.write_bytes(b""), "no plain .npy array"),
    "half an archive": (lambda path: path.write_bytes(b"PK\x03\x04half"), "no plain .npy array"),
    "half a file": (lambda path: (np.save(path, normal(20, 2)), path.write_bytes(path.read_bytes()[:200])), "no plain"),
    "a table": (lambda path: path.write_text("1.0,2.0\n" * 20), "no plain .npy array"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_before_any_work(what, tmp_path, monkeypatch):
    write, message = BAD[what]
    path, out = tmp_path / "x.npy", tmp_path / "run"
    write(path)
    monkeypatch.setattr(ebm, "make_loop", None)  # nothing is built
    with pytest.raises(InvalidInputError, match=f"--data.*{message}"):
        ebm.run(ebm.Config(data=str(path), out=out))
    assert not out.exists()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InvalidInputError, match="no such file"):
        read_array(str(tmp_path))


def test_a_column_that_is_constant_but_for_rounding():
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1000 + 1e-5 * x[:, 0]
    with pytest.raises(InvalidInputError, match=r"columns \[0\] are constant"):
        split(x, Noise(0))


OPTIONS = {
    "--steps": {"steps": 0},
    "--particles must be an integer": {"particles": 8},
    "--particles must be a multiple of 8": {"particles": 20},
    "--leapfrogs": {"leapfrogs": 0},
    "--width": {"width": 0},
    "--seeds": {"seeds": 0},
    "--seed must": {"seed": -1},
    "--refresh": {"refresh": -1},
    "--step-size": {"step_size": float("nan")},
    "--step-size must": {"step_size": 0.0},
    "--lr": {"lr": float("inf")},
    "--weight-decay": {"weight_decay": -0.1},
    "--data circle: no such file": {"data": "circle"},
    "--sampler underdamped knows no weights; .*--no-weighted": {"sampler": "underdamped"},
    "--sampler underdamped knows no weights; take ula, mala or hmc$": {"sampler": "underdamped", "compare": True},
    "--lr has no effect: --compare searches": {"compare": True, "lr": 1e-3},
    "--refresh has no effect: --compare never": {"compare": True, "refresh": 10},
    "--no-weighted has no effect": {"compare": True, "weighted": False},
    "--long-chains has no effect": {"compare": True, "long_chains": True},
    "--seeds has no effect: it is .* of --compare": {"seeds": 3},
    "--leapfrogs has no effect: --sampler ula has none": {"sampler": "ula", "leapfrogs": 4},
    "--refresh has no effect: particles without weights": {"weighted": False, "refresh": 10},
    "--long-chains is for images": {"long_chains": True},
    "--judge-steps": {"judge_steps": 1},
    "conv needs images": {"potential": "conv"},
    "--compare needs a law of the plane": {"compare": True, "data": "digits"},
    "--steps 2 are too few": {"compare": True, "sampler": "ula", "steps": 2},
}


@pytest.mark.parametrize("message", OPTIONS)
def test_bad_options_are_named_and_leave_no_folder(message, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InvalidInputError, match=message):
        ebm.run(ebm.Config(out=out, **OPTIONS[message]))
    assert not out.exists()


def test_images_want_conv(tmp_path):
    np.save(tmp_path / "x.npy", normal(20, 1, 4, 4))
    with pytest.raises(InvalidInputError, match="--potential mlp needs vectors"):
        ebm.run(ebm.Config(data=str(tmp_path / "x.npy"), potential="mlp", out=tmp_path / "run"))


def test_an_out_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    for compare in (False, True):
        with pytest.raises(InvalidInputError, match="not empty"):
            ebm.run(ebm.Config(out=tmp_path, compare=compare))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert cli.main(["ebm", "--sampler", "underdamped", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --sampler underdamped knows no weights") and said.count("\n") == 1
    assert cli.main(["score", "--model", out, "--data", "x.npy"]) == 2
    assert cli.main(["tilt", "--model", out]) == 2
    assert all(line.startswith("error: --model") for line in capsys.readouterr().err.splitlines())
