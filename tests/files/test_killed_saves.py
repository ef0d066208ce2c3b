"""Saves that end at any operation of the file system, by a kill or a fault: the old state or the new one is there."""

import errno
import os
import shutil
import signal

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.checkpoints import Checkpoints
from implicit_diffusion.files.manifest import MANIFEST
from implicit_diffusion.files.states import STATE_FILE, load_state, save_state
from tests.helpers.faults import FREE, Operations, in_child, kill_at, refuse_from, vanish_at

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="forks, and descriptors in /proc")


def state(k):
    return {"k": k, "x": torch.full((64,), float(k)), "moments": {0: torch.tensor([k + 0.5], dtype=torch.float64)}}


def holds(found, k):
    return found["k"] == k and found["x"].eq(k).all() and found["moments"][0].item() == k + 0.5


class Numbered:
    """A checkpoint in a folder of its own, beside two older ones, of which one is then removed."""

    def __init__(self, folder):
        self.checkpoints = Checkpoints(folder / "checkpoint", {"begun": "today"})

    def before(self):
        self.checkpoints.save(1, state(1))
        self.checkpoints.save(2, state(2))

    def save(self, k):
        self.checkpoints.save(k, state(k))

    def newest(self):
        number, found = self.checkpoints.newest(pytest.fail)  # nothing is damaged, so that nothing is passed over
        assert holds(found, number)
        return number


class Waiting(Numbered):
    """A checkpoint that waits until it is known to be sound."""

    def save(self, k):
        self.checkpoints.write(k, state(k))
        self.checkpoints.confirm(k)


class Again(Numbered):
    """A checkpoint in place of one of the same number."""

    def before(self):
        self.checkpoints.save(3, state(2))

    def save(self, k):
        self.checkpoints.save(3, state(k))

    def newest(self):
        return self.checkpoints.newest(pytest.fail).state["k"]

    def files(self, k):
        return {f"checkpoint/000003/{name}" for name in (STATE_FILE, MANIFEST)}


class WaitingAgain(Again):
    """A checkpoint that waits to take the place of one of the same number, as while a queue fills."""

    def save(self, k):
        self.checkpoints.write(3, state(k))
        self.checkpoints.confirm(3)


class First(Numbered):
    """The first checkpoint of a run."""

    def before(self):
        pass

    def newest(self):
        return super().newest() if self.checkpoints.numbers() else 2


class Replaced:
    """A state in a folder that holds one: of a plan, of a judgement, of a model that is kept."""

    def __init__(self, folder):
        self.folder = folder / "plan"

    def before(self):
        self.save(2)

    def save(self, k):
        save_state(self.folder, state(k))

    def newest(self):
        found = load_state(self.folder)
        assert holds(found, found["k"])
        return found["k"]

    def files(self, k):
        return {f"plan/{STATE_FILE}", f"plan/{MANIFEST}"}


WAYS = [
    Numbered,
    Replaced,
    *(pytest.param(way, marks=pytest.mark.slow) for way in (Waiting, Again, WaitingAgain, First)),
]


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def faulted(way, tmp_path, name, fault):
    """The folder after a save of state 3 that a fault meets, with how the process ended."""
    folder = tmp_path / str(name)
    shutil.copytree(tmp_path / "before", folder)

    def job():
        operations = Operations(folder, fault(folder))
        way(folder).save(3)
        return operations.count

    return folder, *in_child(job)


def prepared(way, tmp_path):
    """The number of operations of a save of state 3."""
    (tmp_path / "before").mkdir()
    way(tmp_path / "before").before()
    _, status, count = faulted(way, tmp_path, "whole", lambda folder: lambda *operation: None)
    assert status == 0, count
    assert int(count) > 10
    return int(count)


def check_next_save(way, folder):
    """A further save works, and clears what was left."""
    after = way(folder)
    older = {path.name for path in folder.glob("checkpoint/*") if path.suffix != ".tmp"}
    after.save(4)
    assert after.newest() == 4
    left = files(folder)
    assert not [name for name in left if ".tmp" in name] and not list(folder.rglob("*.tmp"))
    if way in (Again, WaitingAgain, Replaced):
        assert left == after.files(4)
    else:
        kept = {"000004", *sorted(older, reverse=True)[:1]}
        assert left == {f"checkpoint/{n}/{name}" for n in kept for name in (STATE_FILE, MANIFEST)}


@pytest.mark.parametrize(
    "way",
    [Replaced, *(pytest.param(way, marks=pytest.mark.slow) for way in (Numbered, Waiting, Again, WaitingAgain, First))],
)
def test_a_kill_at_every_operation_of_a_save(way, tmp_path):
    found = []
    for number in range(prepared(way, tmp_path)):
        folder, status, _ = faulted(way, tmp_path, number, lambda _, number=number: kill_at(number))
        assert status == -signal.SIGKILL
        found.append(way(folder).newest())
        check_next_save(way, folder)
    assert set(found) == {2, 3} and found == sorted(found)  # the old one up to some operation, then the new one


REFUSALS = {"full": (errno.ENOSPC, FREE), "read-only": (errno.EROFS, ())}


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (Numbered, "full"),
        *(
            pytest.param(way, kind, marks=pytest.mark.slow)
            for way in (Numbered, Waiting, Again, WaitingAgain, First, Replaced)
            for kind in REFUSALS
            if (way, kind) != (Numbered, "full")
        ),
    ],
)
def test_a_disk_that_refuses_from_any_operation_on(way, kind, tmp_path):
    """One of our errors names the file; the old state or the new one is there, and nothing is left that takes room."""
    code, allowed = REFUSALS[kind]
    for number in range(prepared(way, tmp_path)):
        folder, status, says = faulted(
            way, tmp_path, number, lambda _, number=number: refuse_from(number, code, allowed)
        )
        if status:  # what only tidies up may fail in silence
            assert says.startswith(f"StorageError: {folder}/") and f"cannot be written ({os.strerror(code)})" in says
            assert says.endswith("make room there, and check that the folder exists and is writable")
        assert way(folder).newest() in ((2, 3) if status else (3,))
        if kind == "full" and status:
            assert not [name for name in files(folder) if ".tmp" in name]
        check_next_save(way, folder)


@pytest.mark.slow
def test_a_folder_that_vanishes_is_not_made_again(tmp_path):
    """A run without its config, inputs and metrics would be neither the old one nor a new one."""
    for number in range(prepared(Numbered, tmp_path)):
        folder, status, says = faulted(Numbered, tmp_path, number, lambda f, number=number: vanish_at(number, f))
        if status:
            assert says.startswith(f"StorageError: {folder}/")
            assert says.endswith("that the folder exists and is writable")
        assert not folder.exists()
    with pytest.raises(InvalidInputError, match="no state to continue from"):
        Numbered(folder).newest()
