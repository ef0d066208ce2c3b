"""IDX files and arrays as images: what is in them, to the number, or an error that names the file."""

import gzip
import struct

import numpy as np
import pytest
import torch

from implicit_diffusion.commands.ebm.data import load_data
from implicit_diffusion.commands.pretrain.images.loading import load_images
from implicit_diffusion.commands.shared import inputs
from implicit_diffusion.commands.shared.arrays import idx
from implicit_diffusion.commands.shared.arrays.array_files import read_array_file
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (20, 8, 8), dtype=np.uint8)
LABELS = (np.arange(20) % 3 * 2).astype(np.uint8)  # 0, 2, 4


def content(array):
    """As the format's description has it."""
    code = CODES[array.dtype.str[1:]]
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, code, array.ndim)) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write(path, array, *, zipped=False):
    path.write_bytes(gzip.compress(content(array)) if zipped else content(array))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train-images-idx3-ubyte.gz", PIXELS, zipped=True)
    write(tmp_path / "train-labels-idx1-ubyte", LABELS)
    write(tmp_path / "t10k-images-idx3-ubyte.gz", PIXELS[:3], zipped=True)
    return tmp_path


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_type_is_read_to_the_number(code, zipped, tmp_path):
    array = (np.arange(24).reshape(2, 3, 2, 2) * 5 - (0 if code == "u1" else 60)).astype(code)
    read = read_array_file(write(tmp_path / "numbers-idx4-ubyte", array, zipped=zipped)).array
    assert np.array_equal(read, array) and read.dtype == array.dtype and read.dtype.isnative


def test_a_folder_is_its_training_images_with_their_labels(folder, capsys):
    images = load_images(str(folder), classes=True)
    x, labels = torch.cat([images.train, images.held_out]), torch.cat([images.train_labels, images.held_out_labels])
    assert x.dtype == torch.uint8 and x.shape == (20, 1, 8, 8) and images.classes == ("0", "2", "4")
    assert images.left_out == ("'t10k-images-idx3-ubyte.gz' (not training images)",)
    for image, label in zip(x, labels):  # each with its own
        (i,) = np.flatnonzero((image.numpy()[0] == PIXELS).all((1, 2)))
        assert LABELS[i] == 2 * label
    assert "t10k-images" in capsys.readouterr().out
    assert load_images(str(folder)).classes == () and "--classes conditions the model" in capsys.readouterr().out
    data = load_data(str(folder), Noise(0))
    assert data.event_shape == (1, 8, 8) and len(data.train) + len(data.held_out) == 20 and not data.dequantised
    assert inputs.inputs(type("options", (), {"data": str(folder)})())["data"]["folder"]


def test_arrays_of_images_are_what_they_hold(tmp_path, capsys):
    colours = rng.integers(0, 256, (6, 3, 8, 8))
    np.save(tmp_path / "colours.npy", colours)
    images = load_images(str(tmp_path / "colours.npy"))
    assert sorted(map(bytes, torch.cat([images.train, images.held_out]).numpy())) == sorted(
        map(bytes, colours.astype(np.uint8))
    )
    np.savez(tmp_path / "set.npz", x_train=PIXELS, y_train=LABELS.astype(np.int64), x_test=PIXELS[:2])
    images = load_images(f"{tmp_path}/set.npz:x_train", classes=True)
    assert images.classes == ("0", "2", "4") and len(images.train) + len(images.held_out) == 20
    for low, name in ((0.0, "unit"), (-1.0, "signed")):
        floats = np.linspace(low, 1, 6 * 64).reshape(6, 8, 8)
        np.save(tmp_path / f"{name}.npy", floats)
        images = load_images(str(tmp_path / f"{name}.npy"))
        x = torch.cat([images.train, images.held_out])
        assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
        assert ("taken as levels in [0, 1]" in capsys.readouterr().out) == (low == 0)
    np.save(tmp_path / "black-and-white.npy", PIXELS > 100)
    assert set(load_images(str(tmp_path / "black-and-white.npy")).train.unique().tolist()) == {0, 255}
    images = load_images(f"{tmp_path}/set.npz:x_train", size=(4, 6))
    assert images.event_shape == (1, 4, 6) and "brought to 4×6" in capsys.readouterr().out


def test_a_package_that_is_known_by_name(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(idx.PACKAGES, "fashion-mnist", folder)
    images = load_images("fashion-mnist", classes=True)
    assert images.name == "fashion-mnist" and images.classes == ("T-shirt", "pullover", "coat")
    data = load_data("fashion-mnist", Noise(0))
    assert data.dequantised and data.lattice.spacing == 1
    assert inputs.inputs(type("options", (), {"data": "fashion-mnist"})())["data"]["files"]
    monkeypatch.setitem(idx.PACKAGES, "fashion-mnist", tmp_path / "nowhere")
    for load in (load_images, lambda name: load_data(name, Noise(0))):
        with pytest.raises(InvalidInputError, match=r"nowhere is missing; `sudo apt install dataset-fashion-mnist`"):
            load("fashion-mnist")


def broken(change):
    def make(path):
        write(path / "train-images-idx3-ubyte", PIXELS)
        whole = (path / "train-images-idx3-ubyte").read_bytes()
        (path / "train-images-idx3-ubyte").write_bytes(change(whole))
        return str(path)

    return make


def saved(array):
    def make(path):
        np.save(path / "x.npy", array)
        return str(path / "x.npy")

    return make


def labelled(labels):
    def make(path):
        write(path / "train-images-idx3-ubyte", PIXELS)
        write(path / "train-labels-idx1-ubyte", labels)
        return str(path)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (broken(lambda b: b[:-1]), r"not a sound IDX file \(train-images-idx3-ubyte\): .*1280 bytes .*and 1279 follow"),
        (broken(lambda b: b + b"\0"), r"says 1280 bytes of shape \(20, 8, 8\), and more follow"),
        (broken(lambda b: b"\1" + b[1:]), "begins with 01 00 08 03, not with the four bytes"),
        (broken(lambda b: b[:9]), "ends within its header"),
        (broken(lambda b: b""), "begins with nothing"),
        (broken(lambda b: gzip.compress(b)[:-9]), "not a sound IDX file"),
        (saved(PIXELS.astype(float)), r"holds numbers from 0 to 255; floats must be in \[0, 1\] or in \[-1, 1\]"),
        (saved(PIXELS.astype(int) - 3), "holds whole numbers from -3 to 252; grey levels are 0 to 255"),
        (saved(np.full((5, 8, 8), np.nan)), "holds numbers from nan to nan"),
        (saved(PIXELS[..., None]), r"got \(20, 8, 8, 1\); save array.transpose\(0, 3, 1, 2\)"),
        (saved(PIXELS[:, 0]), r"must have shape \(n, height, width\), or .*got \(20, 8\)"),
        (saved(PIXELS[:, :7] / 255), "has images of 7×8 pixels, to be brought to 8×8; that is done with grey levels"),
        (labelled(LABELS[:-1]), r"must be 20 whole numbers, one for each image, got uint8 of shape \(19,\)"),
        (labelled(0 * LABELS), "all images of .* have the label 0; leave --classes out"),
        (saved(PIXELS), "has no labels; leave --classes out"),
    ],
)
def test_what_is_no_image_is_refused_by_name(make, message, tmp_path):
    name = make(tmp_path)
    with pytest.raises(InvalidInputError, match=message):
        load_images(name, classes=True)


def test_two_files_of_training_images_are_refused(folder):
    write(folder / "train-images.idx3-ubyte", PIXELS)
    with pytest.raises(InvalidInputError, match="several files of training images, train-images-idx3"):
        load_images(str(folder))
