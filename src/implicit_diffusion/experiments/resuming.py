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
    from implicit_diffusion.experiments import ebm, finetune, finetune_config, pretrain, pretrain_config

    directory = RunDirectory(path)
    if not path.is_dir():
        raise InvalidInputError(f"there is no run {path}; name the folder that --out named")
    if any(path.glob("beta-*")):
        raise InvalidInputError(f"{path} is a sweep: the `sweep` command that began it goes on with it")
    if (path / "summary.json").exists():
        raise InvalidInputError(f"{path} is no interrupted run: it is finished, and {path}/model is its result")
    if (path / "plan.json").exists() and not (path / "config.json").exists():
        raise InvalidInputError(f"{path} is no interrupted run: it holds a plan; `finetune --out {path}` trains")
    if not directory.checkpoint.exists() or not (path / "config.json").exists():
        raise InvalidInputError(
            f"{path} is no interrupted run: it has no checkpoint/ to go on from; start it again with another --out"
        )
    values = json.loads((path / "config.json").read_text())
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    experiments: tuple[tuple[Any, Any], ...] = (
        (finetune_config.Config, finetune.run),
        (ebm.Config, ebm.run),
        (pretrain_config.Config, pretrain.run),
    )
    for kind, run in experiments:
        fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
        if fields.keys() == values.keys():
            paths = {name: Path(values[name]) for name in fields if "Path" in fields[name] and values[name] is not None}
            return run(kind(**values | paths | {"out": path}), directory)
    raise InvalidInputError(f"{path}/config.json belongs to no experiment of this release that can be resumed")
