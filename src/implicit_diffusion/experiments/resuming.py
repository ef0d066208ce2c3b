"""Go on with an interrupted run, or write its report again, whichever experiment it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.runs import RunDirectory


class Experiment(NamedTuple):
    """What can be done with a run directory: go on with it, and make again what is derived."""

    config: Any
    run: Callable[..., dict[str, Any]]
    report: Callable[[RunDirectory], dict[str, Any]]
    last: str  # of the files that a run writes


def resume(path: Path) -> dict[str, Any]:
    """Go on with an interrupted run, bit for bit as if it had not been interrupted; returns its summary.

    Raises:
        InvalidInputError: no interrupted run there.
    """
    directory = _open(path)
    with directory.held():
        finished = (path / "summary.json").exists()
        if not finished and not (path / "config.json").exists():
            if (path / "plan.json").exists():
                raise InvalidInputError(
                    f"{path} is no interrupted run: it holds a plan; `finetune --out {path}` trains"
                )
            raise InvalidInputError(f"{path} is no interrupted run: nothing had begun; give the first command again")
        experiment, values = _experiment(directory)
        if finished and (path / experiment.last).exists():
            raise InvalidInputError(
                f"{path} is no interrupted run: it is finished, and {path}/model is its result; `report` draws it again"
            )
        if finished:
            return experiment.report(directory)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        fields = {field.name: str(field.type) for field in dataclasses.fields(experiment.config)}
        paths = {name: Path(values[name]) for name in fields if "Path" in fields[name] and values[name] is not None}
        return experiment.run(experiment.config(**values | paths | {"out": path}), directory)


def report(path: Path) -> dict[str, Any]:
    """Draw the figures of a finished run, and write its report, from what is on disk; returns the summary.

    Raises:
        InvalidInputError: no finished run there, or one whose figures are not made from what is on disk.
    """
    directory = _open(path)
    with directory.held():
        if not (path / "summary.json").exists():
            raise InvalidInputError(f"{path} is not finished: it has no summary.json; `resume {path}` goes on with it")
        return _experiment(directory)[0].report(directory)


def _open(path: Path) -> RunDirectory:
    if not path.is_dir():
        raise InvalidInputError(f"there is no run {path}; name the folder that --out named")
    if any(path.glob("beta-*")):
        raise InvalidInputError(f"{path} is a sweep: the `sweep` command that began it goes on with it")
    return RunDirectory(path)


def _experiment(directory: RunDirectory) -> tuple[Experiment, dict[str, Any]]:
    """The experiment that a run belongs to, by the options in its config.json, and these."""
    from implicit_diffusion.experiments import (
        ebm,
        finetune,
        finetune_config,
        hexagon,
        pretrain,
        pretrain_config,
        recovery,
        tilt,
    )

    values = directory.read_config()
    for experiment in (
        Experiment(finetune_config.Config, finetune.run, finetune.report, "report.html"),
        Experiment(ebm.Config, ebm.run, ebm.report, "summary.json"),
        Experiment(pretrain_config.Config, pretrain.run, pretrain.report, "summary.json"),
        Experiment(tilt.Config, tilt.run, tilt.report, "summary.json"),
        Experiment(recovery.Config, recovery.run, recovery.report, "summary.json"),
        Experiment(hexagon.Config, hexagon.run, hexagon.report, "summary.json"),
    ):
        if values is not None and values.keys() == {field.name for field in dataclasses.fields(experiment.config)}:
            return experiment, values
    raise InvalidInputError(
        f"{directory.path}/config.json belongs to no experiment of this release that can be resumed or drawn again"
    )
