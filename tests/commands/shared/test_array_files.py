"""Arrays in files: every format gives the numbers that were written, and what cannot be read is refused by name."""

import io
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from implicit_diffusion.commands.ebm import command as ebm
from implicit_diffusion.commands.ebm.data import load_data
from implicit_diffusion.commands.shared.arrays.array_files import place_of, read_array_file
from implicit_diffusion.commands.shared.arrays.data_arrays import read_array
from implicit_diffusion.commands.shared.inputs import absolute, inputs
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.noise import Noise


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def table(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def rows(array, mark=","):
    return "\n".join(mark.join(map(repr, row)) for row in array.tolist()) + "\n"


HEADS = {
    "none": ("", ",", None),
    "names": ("height,width\n", ",", ("height", "width")),
    "of numpy": ("# height,width\n", ",", ("height", "width")),
    "quoted": ('"a, in mm","b"\r\n', ",", ("a, in mm", "b")),
    "semicolons": ("a;b\n", ";", ("a", "b")),
    "tabs": ("a\tb\n", "\t", ("a", "b")),
    "a nameless column": ("a,\n", ",", ("a", "column 2")),
}


@pytest.mark.parametrize("what", HEADS)
def test_a_table_is_what_was_written(what, tmp_path):
    head, mark, columns = HEADS[what]
    array = numbers(12, 2)
    data = read_array_file(table(tmp_path / "x.csv", head + rows(array, mark)))
    assert np.array_equal(data.array, array) and data.columns == columns


def test_a_table_of_a_spreadsheet(tmp_path):
    """With a byte order mark, carriage returns, and blank lines at the end."""
    text = "height,width\r\n" + "1.5,-2e3\r\n" * 12 + "\r\n\r\n"
    data = read_array_file(table(tmp_path / "X.CSV", text, "utf-8-sig"))
    assert data.columns == ("height", "width") and np.array_equal(data.array, [[1.5, -2000]] * 12)


def test_names_of_columns_reach_the_data_and_its_messages(tmp_path):
    name = table(tmp_path / "x.csv", "height,width\n" + rows(numbers(20, 2)))
    assert load_data(name, Noise(0)).names == ("height", "width")
    still = table(tmp_path / "y.csv", "height,width\n" + "".join(f"{i / 7},2.5\n" for i in range(20)))
    with pytest.raises(InvalidInputError, match="columns width are constant"):
        load_data(still, Noise(0))
    assert load_data("moons", Noise(0)).names == ("$x_{1}$", "$x_{2}$")


NO_TABLE = {
    "a word": ("a,b\n1,2\n3,x\n5,6\n", r"column 2 \(b\) holds no number in 1 of 3 rows, in line 3 'x'"),
    "a column of words": (
        "a,b\n1,red\n2,blue\n",
        r"column 2 \(b\) holds no number in 2 of 2 rows, .*'red'. Leave",
    ),
    "an empty cell": ("1,2\n3,\n5,6\n", r"column 2 holds no number in 1 of 3 rows, in line 2 empty"),
    "a word in the first of the rows": ("1,x\n1,2\n", r"column 2 holds no number in 1 of 2 rows, in line 1 'x'"),
    "decimal commas": (
        "a;b\n1,5;2\n",
        r"column 1 \(a\) holds no number in 1 of 1 rows, in line 2 '1,5'.*: write points",
    ),
    "digits in groups": ("a,b\n1_000,2\n", "'1_000'"),
    "an integer that would be rounded": ("a,b\n1,9007199254740993\n", "column 2 .*'9007199254740993'"),
    "more digits than are read": ("a,b\n1," + "9" * 5000 + "\n", r"column 2 \(b\) holds no number"),
    "a short row": ("a,b\n1,2\n3\n", "line 3 has 1 cells, the first one 2"),
    "a long row": ("1,2\n3,4,5\n", "line 2 has 3 cells, the first one 2"),
    "a quote that never ends": ('a,b\n1,"2\n', "not a sound .csv table"),
    "nothing": ("", r"holds no data|must have shape"),
    "a header alone": ("a,b\n", r"holds no data, got shape \(0, 2\)"),
    "an index": (",a\n0,1.5\n1,2.5\n2,0.5\n", "column 1 has no name and counts the rows"),
    "NaN": ("a,b\n" + "1,2\n" * 11 + "nan,1\n", r"1 of 12 rows hold NaN or infinity.*rows 11"),
}


@pytest.mark.parametrize("what", NO_TABLE)
def test_tables_that_are_refused(what, tmp_path):
    text, message = NO_TABLE[what]
    with pytest.raises(InvalidInputError, match=message) as refused:
        read_array(table(tmp_path / "x.csv", text))
    assert str(refused.value).startswith("--data ") and "\n" not in str(refused.value)


def test_a_table_that_is_no_text(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe1\x00,\x002\x00\n\x00")
    with pytest.raises(InvalidInputError, match=r"not a sound .csv table: 'utf-8'"):
        read_array(str(tmp_path / "x.csv"))


def test_the_largest_integers_of_a_table(tmp_path):
    data = read_array_file(table(tmp_path / "x.csv", "9007199254740992,-9007199254740992\n9007199254740994,1e300\n"))
    assert data.array.tolist() == [[2.0**53, -(2.0**53)], [2.0**53 + 2, 1e300]]


@pytest.mark.parametrize("compressed", [False, True])
def test_an_array_of_an_archive(compressed, tmp_path):
    save = np.savez_compressed if compressed else np.savez
    x, y = numbers(12, 3).astype("float32"), numbers(12, 1, 2, 2)
    save(tmp_path / "one.npz", x=x)
    save(tmp_path / "two.npz", x=x, y=y)
    assert np.array_equal(read_array(str(tmp_path / "one.npz")).numpy(), x)
    assert np.array_equal(read_array(f"{tmp_path}/two.npz:x").numpy(), x)
    assert np.array_equal(read_array(f"{tmp_path}/two.npz:y").numpy(), y)
    with pytest.raises(InvalidInputError, match=r"got 2 \(x, y\); name one, as in .*two.npz:x"):
        read_array(str(tmp_path / "two.npz"))
    with pytest.raises(InvalidInputError, match="holds no array z, but x, y"):
        read_array(f"{tmp_path}/two.npz:z")


def test_an_array_of_safetensors(tmp_path):
    x = torch.from_numpy(numbers(12, 3))
    arrays = {"x": x, "half": x.bfloat16(), "complex": torch.complex(x.float(), x.float())}
    save_file(arrays, tmp_path / "x.safetensors")
    assert torch.equal(read_array(f"{tmp_path}/x.safetensors:x"), x)
    assert torch.equal(read_array(f"{tmp_path}/x.safetensors:half"), x.bfloat16().float())
    with pytest.raises(InvalidInputError, match=r"must hold one array of numbers, got torch.complex64"):
        read_array(f"{tmp_path}/x.safetensors:complex")


PICKLES = ["x.pt", "x.pth", "x.PKL", "x.pickle", "x.joblib", "x.ckpt", "x.npy", "x"]


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_refused_with_a_safe_way_out(name, tmp_path, monkeypatch):
    torch.save(torch.zeros(20, 2), tmp_path / name)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InvalidInputError, match=r"numpy\.save\('x\.npy', x\)") as refused:
        ebm.run(ebm.Config(data=str(tmp_path / name), out=tmp_path / "run"))
    assert "weights_only" not in str(refused.value) and "allow_pickle" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def objects(path):
    np.savez(path, x=np.array([[{}, 1]] * 20, dtype=object))


def bomb(path, size=10**9):
    """A gigabyte of zeros in a megabyte, under a header that promises a small array."""
    header = io.BytesIO()
    np.save(header, np.zeros((20, 2)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        file.write(header.getvalue())
        for _ in range(size // 10**8):
            file.write(bytes(10**8))


def long_header(path):
    """A header that promises four gigabytes of itself."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        file.write(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
        file.write(bytes(10**8))


def damaged(path):
    np.savez(path, x=numbers(20, 2))
    contents = bytearray(path.read_bytes())
    contents[200] ^= 1
    path.write_bytes(contents)


NO_ARCHIVE = {
    "objects": (objects, "it holds Python objects, and loading them would run code"),
    "more than its header says": (lambda path: bomb(path, 10**8), "its header says 320 bytes of shape .*, and 1"),
    "a header that is too long": (long_header, "not a sound .npz archive of arrays"),
    "a damaged one": (damaged, "not a sound .npz archive of arrays: .*CRC"),
    "no archive": (lambda path: path.write_bytes(b"x"), "not a sound .npz archive of arrays"),
    "no arrays": (lambda path: zipfile.ZipFile(path, "w").close(), "holds no arrays"),
}


@pytest.mark.parametrize("what", NO_ARCHIVE)
def test_archives_that_are_refused(what, tmp_path):
    write, message = NO_ARCHIVE[what]
    write(tmp_path / "x.npz")
    with pytest.raises(InvalidInputError, match=f"--data.*{message}"):
        read_array(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("name", ["x.npz", "x.csv", "x.safetensors"])
def test_what_does_not_fit_into_memory_is_refused_before_it_is_unpacked(name, tmp_path, monkeypatch):
    x = np.zeros((1000, 40))
    np.savez_compressed(tmp_path / "x.npz", x=x)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",")
    save_file({"x": torch.from_numpy(x)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 36 * 40_000 - 1}))
    with pytest.raises(MemoryLimitError, match=r"numbers need .*use fewer rows"):
        read_array(str(tmp_path / name))


def test_a_name_within_a_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", a=numbers(12, 2))
    config = absolute(ebm.Config(data="x.npz:a"))
    assert config.data == f"{tmp_path}/x.npz:a" and inputs(config)["data"] == inputs(ebm.Config(data="x.npz"))["data"]
    assert place_of("x.npz:a") == ("x.npz", "a") and place_of("x.npz") == ("x.npz", None)
    assert place_of("C:x.npy") == ("C:x.npy", None) and place_of("moons") == ("moons", None)
    (tmp_path / "odd.npz:a").write_bytes(b"")
    assert place_of("odd.npz:a") == ("odd.npz:a", None)
