"""Checkpoints: which stay, which is continued from, what is said of the others."""

import json
import shutil

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError, StorageError
from implicit_diffusion.files import states
from implicit_diffusion.files.checkpoints import Checkpoints
from implicit_diffusion.files.manifest import MANIFEST, Manifest, OtherSchemaError, read_manifest
from implicit_diffusion.files.states import STATE_FILE
from tests.files.test_manifest import flip


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoint", {"command": "ebm", "begun": "today"})


def state(k):
    return {"k": k, "x": torch.full((5,), float(k))}


def damage(checkpoints, number):
    flip(checkpoints.path(number) / STATE_FILE, -1, 0)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep, checkpoints):
    for k in range(0, 60, 10):
        checkpoints.save(k, state(k), keep)
    assert checkpoints.numbers() == [50, 40, 30][:keep]
    assert [checkpoints.newest(pytest.fail).state["k"]] == [50]
    assert {path.name for path in checkpoints.folder.iterdir()} == {f"{k:06d}" for k in checkpoints.numbers()}


def test_a_state_waits_until_it_is_confirmed(checkpoints):
    checkpoints.save(1, state(1))
    checkpoints.write(2, state(2))
    assert checkpoints.numbers() == [1] and checkpoints.newest(pytest.fail).number == 1
    checkpoints.confirm()
    assert checkpoints.newest(pytest.fail).number == 2
    checkpoints.write(3, state(3))
    checkpoints.discard()
    assert checkpoints.numbers() == [2, 1]
    with pytest.raises(StorageError, match="the state that waits is gone"):
        checkpoints.confirm()


def test_older_ones_stay_until_the_new_one_has_been_read_back(checkpoints, monkeypatch):
    checkpoints.save(1, state(1), keep=1)
    saved, there = states.save_file, []

    def lies(tensors, path, metadata):
        saved(tensors, path, metadata=metadata)
        there.append(checkpoints.numbers())
        flip(path, -1, 0)

    monkeypatch.setattr(states, "save_file", lies)
    with pytest.raises(StorageError, match=r"cannot be read back"):
        checkpoints.save(2, state(2), keep=1)
    assert there == [[1]] and checkpoints.newest(pytest.fail).number == 1
    assert [path.name for path in checkpoints.folder.iterdir()] == ["000001"]


def test_the_newest_that_is_as_it_was_written_is_continued_from(checkpoints):
    for k in (10, 20, 30):
        checkpoints.save(k, state(k), keep=3)
    said = []
    damage(checkpoints, 30)
    (checkpoints.path(20) / MANIFEST).unlink()
    assert checkpoints.newest(said.append).state["k"] == 10
    assert len(said) == 2 and all(line.endswith("; continued from update 10") for line in said)
    assert said[0].startswith(f"passed over: {checkpoints.path(30) / STATE_FILE} is damaged: tensor state['x'] is not")
    assert said[1].startswith(f"passed over: {checkpoints.path(20) / MANIFEST} does not exist, which is written last")
    checkpoints.save(15, state(15), keep=3)  # those that nobody continued from go
    assert checkpoints.numbers() == [15, 10]


def test_where_none_is_whole_each_is_named_with_its_reason(checkpoints):
    for k in (10, 20):
        checkpoints.save(k, state(k))
        damage(checkpoints, k)
    shutil.copytree(checkpoints.path(20), checkpoints.path(30))
    with pytest.raises(InvalidInputError, match=f"no state in {checkpoints.folder} can be continued from: ") as error:
        checkpoints.newest(pytest.fail)
    words = str(error.value)
    assert words.count("is damaged") == 2
    assert f"{checkpoints.path(30)} is a state of something else: its number is 20, not 30" in words
    assert [words.index(f"{k:06d}") for k in (30, 20, 10)] == sorted(words.index(f"{k:06d}") for k in (30, 20, 10))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"command": "ebm", "begun": "yesterday"}, "its begun is yesterday, not today"),
        ({"command": "finetune", "begun": "today"}, "its command is finetune, not ebm"),
    ],
)
def test_the_states_of_another_run_or_command_are_passed_over(other, says, checkpoints, tmp_path):
    checkpoints.save(1, state(1))
    foreign = Checkpoints(tmp_path / "foreign", other)
    foreign.save(2, state(2))
    shutil.copytree(foreign.path(2), checkpoints.path(2))
    said = []
    assert checkpoints.newest(said.append).number == 1 and says in said[0]
    shutil.rmtree(checkpoints.path(1))
    with pytest.raises(InvalidInputError, match=says):
        checkpoints.newest(pytest.fail)


def test_a_state_under_another_number_is_passed_over(checkpoints):
    checkpoints.save(1, state(1))
    shutil.copytree(checkpoints.path(1), checkpoints.path(7))
    said = []
    assert checkpoints.newest(said.append).number == 1 and "its number is 1, not 7" in said[0]


def test_a_newer_state_of_another_schema_is_not_passed_over(checkpoints):
    """Another version has continued the run: its updates would be lost."""
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    written = read_manifest(checkpoints.path(2))
    Manifest(written.about, written.file, written.tensors, "9.9", 2).write(checkpoints.path(2))
    with pytest.raises(OtherSchemaError, match=r"000002 has schema 2, of version 9.9"):
        checkpoints.newest(pytest.fail)


def test_what_is_not_a_checkpoint_is_not_counted(checkpoints):
    checkpoints.save(1, state(1))
    for name in ("notes", "7", "0000001", "٣٣٣٣٣٣", "-00001"):
        (checkpoints.folder / name).mkdir()
    assert checkpoints.numbers() == [1]
    checkpoints.save(10**7, state(2))
    assert checkpoints.numbers() == [10**7, 1] and checkpoints.newest(pytest.fail).number == 10**7


def test_no_state_and_that_of_an_earlier_release(checkpoints):
    with pytest.raises(InvalidInputError, match="no state to continue from in"):
        checkpoints.newest(pytest.fail)
    checkpoints.folder.mkdir()
    (checkpoints.folder / STATE_FILE).write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"state.safetensors is from an earlier release"):
        checkpoints.newest(pytest.fail)


def test_a_manifest_is_small_beside_its_state(checkpoints):
    """A line per tensor, whatever their sizes."""
    checkpoints.save(1, {f"layer.{i}": torch.zeros(1000) for i in range(100)})
    folder = checkpoints.path(1)
    assert (folder / MANIFEST).stat().st_size < 0.06 * (folder / STATE_FILE).stat().st_size
    assert len(json.loads((folder / MANIFEST).read_text())["tensors"]) == 100
