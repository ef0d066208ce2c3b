"""The states of a run to continue from: the newest ones, each in a folder of its own.

    000120/       the state of update 120, as `files.states` writes it
    000130.tmp/   a state that is being written, or that waits until it is known to be sound

A folder gets its name, without an ending, in one step, when its state has been written and read back. Only then are
older states removed, and those of later updates, from which nobody has continued. Of several processes, the main one
reads and writes; all of them call a method.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import UNFINISHED, sync_folder, writing
from implicit_diffusion.files.manifest import OtherSchemaError
from implicit_diffusion.files.states import STATE_FILE, load_state, save_state
from implicit_diffusion.processes import main_only

KEEP = 2  # states, by default


class Checkpoint(NamedTuple):
    """A state that has been read.

    Args:
        number: of the update that it follows.
        state: what was saved.
    """

    number: int
    state: Any


@dataclass(frozen=True)
class Checkpoints:
    """The states in a folder, by the number of updates that they follow.

    Args:
        folder: that holds them, now or later.
        about: what they are of, by name: states of something else are passed over.
    """

    folder: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    @main_only
    def numbers(self) -> list[int]:
        """The numbers of all states, whole or not, the newest first."""
        if not self.folder.is_dir():
            return []
        named = {path.name: int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()}
        return sorted((number for name, number in named.items() if name == self.path(number).name), reverse=True)

    def path(self, number: int) -> Path:
        """The folder of a state."""
        return self.folder / f"{number:06d}"

    @main_only
    def save(self, number: int, state: Any, keep: int = KEEP) -> None:
        """Write a state that is known to be sound, in place of one of the same number.

        Args:
            number: of updates so far.
            state: as for `save_state`.
            keep: number of states that stay, this one among them.

        Raises:
            StorageError: it cannot be written; those before are unchanged.
        """
        if number in self.numbers():
            self.discard()
            save_state(self.path(number), state, {"number": number, **self.about})
            self._prune(number, keep)
        else:
            self.write(number, state)
            self.confirm(keep)

    @main_only
    def write(self, number: int, state: Any) -> None:
        """Write a state that waits for `confirm`; arguments and errors as in `save`."""
        self.discard()
        try:
            save_state(self._waiting(number), state, {"number": number, **self.about})
        except BaseException:
            self.discard()  # half a state would keep the disk full
            raise

    @main_only
    def confirm(self, keep: int = KEEP) -> None:
        """Make the state that waits the newest one, in one step, and remove what is beyond the `keep` newest."""
        waiting = next(self.folder.glob(f"*{UNFINISHED}"), self.folder)
        path = waiting.with_suffix("")
        with writing(path):
            if waiting == self.folder:
                raise FileNotFoundError(errno.ENOENT, "the state that waits is gone")
            if path.exists():  # of an update that was made again, since this could not be continued from
                shutil.rmtree(path)
            waiting.rename(path)
            sync_folder(self.folder)
        self._prune(int(path.name), keep)

    @main_only
    def discard(self) -> None:
        """Remove what waits, or was not written to its end."""
        for folder in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(folder, ignore_errors=True)

    @main_only
    def newest(self, say: Callable[[str], None]) -> Checkpoint:
        """The newest state that is as it was written.

        Args:
            say: gets a line for each newer one that is not, with the reason.

        Raises:
            InvalidInputError: there is none; the message has the reason of each.
            OtherSchemaError: another version of this package wrote the newest one: its updates would be lost.
        """
        reasons = []
        for number in self.numbers():
            try:
                state = load_state(self.path(number), {"number": number, **self.about})
            except OtherSchemaError:
                raise
            except InvalidInputError as error:
                reasons.append(str(error))
                continue
            for reason in reasons:
                say(f"passed over: {reason}; continued from update {number}")
            return Checkpoint(number, state)
        if (self.folder / STATE_FILE).exists():
            reasons.append(f"{self.folder / STATE_FILE} is from an earlier release, without a manifest")
        if not reasons:
            raise InvalidInputError(f"no state to continue from in {self.folder}")
        raise InvalidInputError(f"no state in {self.folder} can be continued from: {'; '.join(reasons)}")

    def _waiting(self, number: int) -> Path:
        path = self.path(number)
        return path.with_name(path.name + UNFINISHED)

    def _prune(self, newest: int, keep: int) -> None:
        """Leave `newest` and the `keep` - 1 states before it; what cannot be removed stays."""
        past = [number for number in self.numbers() if number <= newest]
        for number in {*self.numbers()} - {*past[:keep]}:
            with suppress(OSError):
                self.path(number).rename(self._waiting(number))  # in one step: half a state is none
        self.discard()
