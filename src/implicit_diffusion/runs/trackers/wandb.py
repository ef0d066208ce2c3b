"""Weights & Biases, as its own settings say: online, or with WANDB_MODE=offline into the folder of the run.

A run has one id there, kept in its folder, and continues under it. Steps that it makes again give the same numbers, and
are not sent twice.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.trackers.tracking import Pixels
from implicit_diffusion.showing import Shown

PROJECT = "implicit-diffusion"  # where WANDB_PROJECT names no other
KEPT = "wandb.json"  # the id, and how far the run was sent
HERE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no account


class WeightsAndBiases(Shown):
    """Tracker: a run of Weights & Biases.

    Args:
        folder: of the run; the options in its config.json are shown beside the numbers.

    Raises:
        MissingExtraError: wandb is not installed.
        InvalidInputError: nobody is logged in; or, from its methods, W&B refuses.
    """

    def __init__(self, folder: Path) -> None:
        require("wandb")
        import wandb

        self._wandb: Any = wandb
        with self._refusals():
            if os.environ.get("WANDB_MODE") not in HERE and not wandb.login(prompt=False):
                raise InvalidInputError(
                    "Weights & Biases knows no account here: log in with `wandb login`, or set WANDB_MODE=offline"
                )
        self.folder = folder
        kept: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            kept = dict(json.loads((folder / KEPT).read_text(encoding="utf-8")))
        self._id = str(kept.get("id") or uuid.uuid4().hex[:12])
        self._sent = self._at = int(kept.get("sent", -1))  # places in the order in which all is shown
        self._run: Any = None

    def scalars(self, step: int, group: str, numbers: Mapping[str, float]) -> None:
        self._log(step, group, dict(numbers))

    def images(self, step: int, group: str, name: str, pixels: Pixels) -> None:
        self._log(step, group, {name: self._wandb.Image(pixels)})

    def rewind(self, step: int) -> None:
        self._at = step or -1

    def flush(self) -> None:
        if self._run is not None:
            self._sent = max(self._sent, self._at)
            self._keep()

    def close(self) -> None:
        if self._run is not None:
            self.flush()
            with self._refusals():
                self._run.finish()
            self._run = None

    def _keep(self) -> None:
        with replacing(self.folder / KEPT) as file:
            file.write_text(json.dumps({"id": self._id, "sent": self._sent}) + "\n", encoding="utf-8")

    def _log(self, step: int, group: str, values: dict[str, Any]) -> None:
        """Send values, unless they were sent before; those of several trainings have steps of their own."""
        self._at = self._at + 1 if group else step
        if self._at <= self._sent:
            return
        run = self._open()
        with self._refusals():
            if not group:
                run.log(values, step=step)
            else:
                group = group.replace("/", " ")
                run.define_metric(f"{group}/*", step_metric=f"{group}/updates")
                run.log({f"{group}/{name}": value for name, value in (values | {"updates": step}).items()})

    def _open(self) -> Any:
        if self._run is None:
            with self._refusals():
                self._run = self._wandb.init(
                    project=os.environ.get("WANDB_PROJECT", PROJECT),
                    dir=str(self.folder),
                    id=self._id,
                    name=self.folder.name,
                    config=RunDirectory(self.folder).read_config(),
                    resume="allow",
                    reinit="create_new",
                    settings=self._wandb.Settings(console="off", silent=True),
                )
            self._keep()
        return self._run

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Errors of W&B as ours."""
        try:
            yield
        except self._wandb.Error as error:
            said = " ".join(str(error).split())
            raise InvalidInputError(f"Weights & Biases refuses: {said}; or set WANDB_MODE=offline") from error
