"""Data of energy-based models: shapes, standardisation, a share held out, and everything bad refused by name."""

import io
import os

import numpy as np
import pytest
import torch

from implicit_diffusion import cli
from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm.data import COPIES, GREY, load_data, split
from implicit_diffusion.commands.shared.arrays.data_arrays import read_array
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials.plane import LAWS


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("name", LAWS)
def test_laws_come_standardised_and_independent_of_each_other(name):
    data = load_data(name, Noise(0))
    assert data.train.shape == (20_000, 2) and data.held_out.shape == (10_000, 2) and data.event_shape == (2,)
    assert data.law is not None and torch.equal(data.train, load_data(name, Noise(0)).train)
    train, held_out = data.standardised()
    assert train.mean(0).abs().max() < 1e-5 and (train.std(0) - 1).abs().max() < 1e-5
    assert held_out.mean(0).abs().max() < 0.06 and (held_out.std(0) - 1).abs().max() < 0.06
    assert not torch.equal(data.train[:10], data.held_out[:10])


def test_an_array_is_split_without_loss(tmp_path):
    array = normal(50, 3) * [1, 20, 0.1] + [0, -5, 100]
    np.save(tmp_path / "x.npy", array)
    data = load_data(str(tmp_path / "x.npy"), Noise(1))
    assert data.train.shape == (40, 3) and data.held_out.shape == (10, 3) and data.law is None
    both = torch.cat([data.train, data.held_out])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, array.tolist()))
    again, other = (load_data(str(tmp_path / "x.npy"), Noise(seed)) for seed in (1, 2))
    assert torch.equal(data.train, again.train) and not torch.equal(data.train, other.train)
    z, _ = data.standardised()
    torch.testing.assert_close(z.std(0), torch.ones(3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "uint8", "bool", ">f4"])
def test_arrays_of_any_numbers(dtype, tmp_path):
    array = (normal(20, 2) > 0).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    assert torch.equal(read_array(str(tmp_path / "x.npy")), torch.from_numpy(array.astype("float32")))


FAR = {"metres": (5.4e6, 1.0), "days": (2.46e6, 2.0), "seconds": (1.76e9, 600.0), "nanoseconds": (1.76e18, 6e11)}


@pytest.mark.parametrize("what", FAR)
def test_far_from_zero_data_are_standardised_before_they_are_rounded(what, tmp_path):
    """Standardised numbers do not depend on units: x and offset + deviation·x have the same, to rounding in double."""
    offset, deviation = FAR[what]
    x = np.random.default_rng(1).normal(size=(200, 2))
    far = offset + deviation * x
    np.save(tmp_path / "near.npy", (far - offset) / deviation)
    np.save(tmp_path / "far.npy", far)
    near, far = (load_data(str(tmp_path / name), Noise(0)) for name in ("near.npy", "far.npy"))
    for one, other in zip(near.standardised(), far.standardised()):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert far.shift.dtype == far.scale.dtype == torch.float64


def test_moments_of_single_precision_are_summed_in_double(tmp_path):
    array = (1e5 + normal(4000, 1)).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    data = load_data(str(tmp_path / "x.npy"), Noise(0))
    z = data.standardised()[0].double()
    assert z.mean().abs() < 0.004  # half the spacing of single precision at 1e5
    exact = data.train.double().std()
    assert data.train.dtype == torch.float32 and abs(data.scale.item() / exact.item() - 1) < 1e-7


def test_integers_that_double_precision_holds(tmp_path):
    array = 2**53 - np.arange(40).reshape(20, 2) * 3
    np.save(tmp_path / "x.npy", array)
    assert read_array(str(tmp_path / "x.npy")).long().tolist() == array.tolist()
    np.save(tmp_path / "x.npy", array + 2**54 + 1)
    with pytest.raises(InvalidInputError, match=r"integers beyond 2\^53.*subtract an offset"):
        read_array(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_version_and_order_of_the_format(version, order, tmp_path):
    array = np.asarray(normal(12, 3), order=order)
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    x = read_array(str(tmp_path / "x.npy"))
    assert np.array_equal(x.numpy(), array) and x.is_contiguous()


def test_pixels_that_never_change_are_kept(tmp_path):
    images = normal(30, 1, 2, 2)
    images[:, 0, 0, 0] = 7.0
    np.save(tmp_path / "x.npy", images)
    data = load_data(str(tmp_path / "x.npy"), Noise(0))
    assert data.event_shape == (1, 2, 2)
    assert data.scale[0, 0, 0].item() == pytest.approx(0.01 * data.scale.max().item())
    train, held_out = data.standardised()
    assert train.isfinite().all() and held_out.isfinite().all() and (train[:, 0, 0, 0].abs() < 1e-2).all()


def test_digits_are_dequantised_grey_levels():
    data = load_data("digits", Noise(0))
    assert data.event_shape == (1, 8, 8) and data.train.min() >= 0 and data.train.max() < 17
    assert len(data.train) / COPIES + len(data.held_out) == 1797 and data.law is None
    levels = torch.tensor([[0.0, 3.0, 16.0]]).expand(4000, 3)
    x = GREY.dequantise(levels, torch.Generator().manual_seed(0))
    assert torch.equal(x.floor(), levels) and (x - levels).std().item() == pytest.approx(12**-0.5, rel=0.05)


def save(array, **options):
    def write(path):
        np.save(path, array, **options)

    return write


def archive(path):
    buffer = io.BytesIO()
    np.savez(buffer, normal(20, 2))
    path.write_bytes(buffer.getvalue())


def header(shape, descr="<f8", body=b""):
    def write(path):
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            file.write(body)

    return write


def twice(path):
    with path.open("wb") as file:
        np.save(file, normal(20, 2))
        np.save(file, normal(20, 2))


def with_nan(value, count=2):
    array = normal(20, 2)
    array[:count, 1] = value
    return array


def constant():
    array = normal(20, 4)
    array[:, 1], array[:, 3] = 3.0, 0.0
    return array


BAD = {
    "no file": (
        lambda path: None,
        r"no such file; give one of moons, .* digits, fashion-mnist, FILE\.npy, .* FILE\.csv",
    ),
    "NaN": (save(with_nan(np.nan)), r"2 of 20 rows hold NaN or infinity; remove or impute them \(rows 0, 1\)"),
    "a header of ten to the twelve rows": (
        header((10**12, 2)),
        "not a sound .npy array: its header says 16000000000000",
    ),
    "a header beyond all integers": (header((10**30, 10**30)), "not a sound .npy array: its header says"),
    "a header of fewer rows than none": (header((-20, -2), body=bytes(320)), "not a sound .npy array: its header says"),
    "two arrays in one file": (twice, "its header says 320 bytes of shape .*, and 768 follow"),
    "fields": (save(np.zeros(20, dtype=[("a", "f4"), ("b", "f4")])), "must hold one array of numbers, got .*'a'"),
    "long doubles": (save(normal(20, 2).astype(np.longdouble)), "must hold one array of numbers, got float128"),
    "a pipe": (os.mkfifo, "no such file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "no such file"),
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
    "objects": (
        save(np.array([[{}, 1]] * 20, dtype=object), allow_pickle=True),
        "not a sound .npy.*allow_pickle",
    ),
    "words": (save(np.array([["a", "b"]] * 20)), "must hold one array of numbers, got <U1"),
    "complex numbers": (save(normal(20, 2) * 1j), "must hold one array of numbers, got complex128"),
    "dates": (save(np.zeros((20, 2), "datetime64[D]")), "must hold one array of numbers"),
    "an archive": (archive, "must hold one array of numbers"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04\x95\x0b\x00\x00."), "not a sound .npy array"),
    "an empty file": (lambda path: path.write_bytes(b""), "not a sound .npy array"),
    "half an archive": (lambda path: path.write_bytes(b"PK\x03\x04half"), "not a sound .npy array"),
    "half a file": (
        lambda path: (np.save(path, normal(20, 2)), path.write_bytes(path.read_bytes()[:200])),
        "not a sound",
    ),
    "a table": (lambda path: path.write_text("1.0,2.0\n" * 20), "not a sound .npy array"),
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


def test_arrays_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", normal(20, 2))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 40 * 35}))
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(MemoryLimitError, match=r"40 numbers need .*use fewer rows"):
        read_array(str(tmp_path / "x.npy"))


def test_names_of_any_length():
    for name in ("", "x" * 5000, "a\0b"):
        with pytest.raises(InvalidInputError, match="no such file"):
            read_array(name)


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
    "--sampler underdamped does not support weights; .*--no-weighted": {"sampler": "underdamped"},
    "underdamped does not support weights; use ula, mala or hmc$": {"sampler": "underdamped", "compare": True},
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
    with pytest.raises(InvalidInputError, match="potential: mlp needs vectors"):
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
    assert said.startswith("error: --sampler underdamped does not support weights") and said.count("\n") == 1
    assert cli.main(["score", "--model", out, "--data", "x.npy"]) == 2
    assert cli.main(["tilt", "--model", out]) == 2
    assert all(line.startswith("error: --model") for line in capsys.readouterr().err.splitlines())
