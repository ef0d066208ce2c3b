"""TensorBoard's event files, in the folder of the run; no server runs.

A run that continues begins another event file, which says from which step on the earlier ones are void: TensorBoard,
and whatever reads event files with its own reader, shows every step once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from implicit_diffusion.extras import require
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.runs.trackers.tracking import Pixels
from implicit_diffusion.showing import Shown


class TensorBoard(Shown):
    """Tracker: event files.

    Args:
        folder: for them, made when there is something to show.

    Raises:
        MissingExtraError: tensorboard is not installed.
        StorageError: from its methods, where the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        require("tensorboard")
        self.folder = folder
        self._void_from: int | None = None
        self._writer: Any = None

    def scalars(self, step: int, group: str, numbers: Mapping[str, float]) -> None:
        writer = self._open()
        with writing(self.folder):
            for name, value in numbers.items():
                writer.add_scalar(_tag(group, name), value, step)

    def images(self, step: int, group: str, name: str, pixels: Pixels) -> None:
        writer = self._open()
        with writing(self.folder):
            writer.add_image(_tag(group, name), pixels, step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self.close()
        self._void_from = step + 1 if step else 0

    def flush(self) -> None:
        if self._writer is not None:
            with writing(self.folder):
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with writing(self.folder):
                self._writer.close()
            self._writer = self._void_from = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            with writing(self.folder):
                self._writer = SummaryWriter(str(self.folder), purge_step=self._void_from)
        return self._writer


def _tag(group: str, name: str) -> str:
    return f"{group}/{name}" if group else name
