"""What is damaged, missing, foreign or of another form is noticed, to the last bit."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from implicit_diffusion import __version__
from implicit_diffusion.errors import InvalidInputError, StorageError
from implicit_diffusion.files import manifest as manifests
from implicit_diffusion.files import states
from implicit_diffusion.files.manifest import MANIFEST, Manifest, OtherSchemaError, read_manifest
from implicit_diffusion.files.states import STATE_FILE, load_state, save_state

STATE = {"x": torch.tensor([1.5, -2.0]), "k": 7, "best": math.inf, "moments": [torch.ones(2, 2).double()]}
FILES = (STATE_FILE, MANIFEST)


@pytest.fixture
def folder(tmp_path):
    save_state(tmp_path / "state", STATE, {"number": 3})
    return tmp_path / "state"


def flip(path, place, bit):
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1 << bit
    path.write_bytes(contents)


def test_a_manifest_says_what_is_in_the_file(folder):
    written = json.loads((folder / MANIFEST).read_text())
    assert (written["schema"], written["library"], written["about"]) == (1, __version__, {"number": 3})
    assert written["file"]["size"] == (folder / STATE_FILE).stat().st_size
    tensors = written["tensors"]
    assert tensors.keys() == {"state['x']", "state['moments'][0]"} == load_file(folder / STATE_FILE).keys()
    assert {"dtype": "float64", "shape": [2, 2]}.items() <= tensors["state['moments'][0]"].items()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_any_byte_is_noticed(name, folder):
    for place in range((folder / name).stat().st_size):
        bit = (5 * place + 3) % 8
        flip(folder / name, place, bit)
        with pytest.raises(InvalidInputError, match=str(folder)):
            load_state(folder)
        flip(folder / name, place, bit)
    assert load_state(folder)["k"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(name, folder):
    for place in range((folder / name).stat().st_size):
        for bit in range(8):
            flip(folder / name, place, bit)
            with pytest.raises(InvalidInputError, match=str(folder)):
                load_state(folder)
            flip(folder / name, place, bit)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[: len(b) // 2], lambda b: b""])
def test_a_file_that_is_cut_or_longer_is_noticed(name, change, folder):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InvalidInputError, match=str(path)):
        load_state(folder)


def test_a_damaged_tensor_is_named(tmp_path):
    save_state(tmp_path, {"a": torch.ones(3), "b": torch.zeros(3)})
    flip(tmp_path / STATE_FILE, -1, 0)
    with pytest.raises(InvalidInputError, match=r"tensor state\['b'\] is not what was written: its checksum differs"):
        load_state(tmp_path)


@pytest.mark.parametrize(("name", "says"), [(STATE_FILE, "is damaged: .*No such file"), (MANIFEST, "not complete")])
def test_a_missing_file_is_named(name, says, folder):
    (folder / name).unlink()
    with pytest.raises(InvalidInputError, match=f"{name} .*{says}|{name} {says}"):
        load_state(folder)


def test_the_file_of_another_state_is_noticed(folder, tmp_path):
    """Also where it has the same names, sizes and shapes."""
    save_state(tmp_path / "other", STATE | {"x": torch.tensor([1.5, 2.0])})
    shutil.copy(tmp_path / "other" / STATE_FILE, folder)
    with pytest.raises(InvalidInputError, match=r"tensor state\['x'\]"):
        load_state(folder)


def test_a_state_of_something_else_is_refused(folder):
    assert load_state(folder, {"number": 3, "command": "ebm"})["k"] == 7  # what one side does not say is not compared
    with pytest.raises(InvalidInputError, match="is a state of something else: its number is 3, not 4"):
        load_state(folder, {"number": 4})


@pytest.mark.parametrize("schema", [0, 2])
def test_another_schema_is_refused_by_name(schema, folder):
    written = read_manifest(folder)
    Manifest(written.about, written.file, written.tensors, "9.9", schema).write(folder)
    with pytest.raises(
        OtherSchemaError, match=f"has schema {schema}, of version 9.9 of .*{__version__} reads schema 1"
    ):
        load_state(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"about": None},
        {"file": {"size": 3}},
        {"file": {"size": 3, "header": "", "name": "../x"}},
        {"tensors": []},
        {"tensors": {"state['x']": 3}},
        {"more": 1},
    ],
)
def test_a_manifest_that_was_made_by_hand_is_no_error_of_ours(change, folder):
    """Its checksum is right, and its contents are not those of any state."""
    values = {k: v for k, v in json.loads((folder / MANIFEST).read_text()).items() if k != "sha256"}
    (folder / MANIFEST).write_bytes(manifests._written(values | change))
    with pytest.raises(InvalidInputError, match=r"is not a manifest|is damaged"):
        load_state(folder)


def test_a_file_without_a_manifest_is_not_complete(tmp_path):
    save_file({}, tmp_path / STATE_FILE, metadata={"implicit-diffusion state": "1"})
    with pytest.raises(InvalidInputError, match=r"manifest.json does not exist, .* the state is not complete"):
        load_state(tmp_path)


def test_what_is_not_read_back_as_it_was_written_replaces_nothing(folder, monkeypatch):
    """A disk that returns something else than it was given."""

    def lies(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        flip(path, -1, 0)

    monkeypatch.setattr(states, "save_file", lies)
    with pytest.raises(StorageError, match=r"state.safetensors.tmp cannot be read back \(.*checksum differs"):
        save_state(folder, STATE | {"k": 8})
    assert load_state(folder)["k"] == 7
