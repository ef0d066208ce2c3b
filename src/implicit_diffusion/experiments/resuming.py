"""Go on with an interrupted run, whichever experiment it belongs to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory


def resume(path: Path) -> dict[str, Any]:
    """Go on with an interrupted run, bit for bit as if it had not been interrupted; returns its summary.

    Raises:
        InvalidInputError: no interrupted run there.
    """
    from implicit_diffusion.experiments import ebm, finetune

    directory = RunDirectory(path)
    if not directory.checkpoint.exists() or (path / "summary.json").exists():
        raise InvalidInputError(f"{path} is no interrupted run: it needs a checkpoint/ and no summary.json")
    values = json.loads((path / "config.json").read_text())
    for experiment in (finetune, ebm):
        kind: Any = experiment.Config
        if {field.name for field in dataclasses.fields(kind)} == values.keys():
            return experiment.run(kind(**values | {"out": path}), directory)
    raise InvalidInputError(f"{path}/config.json belongs to no experiment of this release that can be resumed")
