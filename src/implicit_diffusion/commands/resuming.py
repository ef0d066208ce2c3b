"""Go on with an interrupted run, or write its report again, whichever experiment it belongs to."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from implicit_diffusion.commands.rewards.trust import check_trust
from implicit_diffusion.commands.shared.inputs import inputs
from implicit_diffusion.errors import ImplicitDiffusionError, InvalidInputError, check_path
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.provenance import device_of, verified

RESULTS = ("model", "report.html", "figures", "summary.json")  # of a run, as far as it has them
PARTS = ("model", "figures", "checkpoint", "judged", "plan")  # folders in that of a run


class Experiment(NamedTuple):
    """What can be done with a run directory: go on with it, and make again what is derived."""

    config: Any
    run: Callable[..., dict[str, Any]]
    report: Callable[[RunDirectory], dict[str, Any]]
    last: str  # of the files that a run writes


def resume(
    path: str | PathLike[str], accept_changes: Collection[str] = (), *, trust_reward: bool = False
) -> dict[str, Any]:
    """Go on with an interrupted run, bit for bit as if it had not been interrupted; returns its summary.

    Args:
        path: the run directory.
        accept_changes: of what the run rests on, by names of `runs.provenance.Change`; others are refused.
        trust_reward: run the code of the reward that the directory names, though this user has not named it, and
            whether or not it has changed.

    Raises:
        InvalidInputError: no interrupted run there; what it rests on has changed; a reward that is not to be trusted.
    """
    path = check_path("the folder of a run", path).absolute()
    directory = _open(path)
    with directory.held():
        finished = (path / "summary.json").exists()
        if not finished and not (path / "config.json").exists():
            if (path / "plan.json").exists():
                raise InvalidInputError(
                    f"{path} is no interrupted run: it holds a plan; `finetune --out {shlex.quote(str(path))}` trains"
                )
            raise InvalidInputError(f"{path} is no interrupted run: nothing had begun; give the first command again")
        experiment, values = _experiment(directory)
        if values.get("plan") and (path / "plan.json").exists():
            raise InvalidInputError(
                f"{path} is no interrupted run: it holds a whole plan; `finetune --out {path}`, with the other "
                "options of the plan, trains"
            )
        if finished and (path / experiment.last).exists():
            raise InvalidInputError(f"{path} is no interrupted run: it is finished; {_results(path, values)}")
        if finished:
            return experiment.report(directory)
        fields = {field.name: str(field.type) for field in dataclasses.fields(experiment.config)}
        paths = {name: Path(values[name]) for name in fields if "Path" in fields[name] and values[name] is not None}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        config = experiment.config(**values | paths | {"out": path})
        reward = str(values.get("reward", ""))
        if not trust_reward:
            check_trust(reward, path)
        with verified(directory, (*accept_changes, *["reward"] * trust_reward), inputs(config)):
            device = device_of(directory)
            if device is not None and "device" in values:
                config = dataclasses.replace(config, device=device)
            try:
                config.check()
            except (TypeError, ValueError, AttributeError) as error:
                if isinstance(error, ImplicitDiffusionError):
                    raise
                raise InvalidInputError(f"{path}/config.json cannot be used: {error}") from error
            return experiment.run(config, directory)


def report(path: str | PathLike[str]) -> dict[str, Any]:
    """Draw the figures of a finished run, and write its report, from what is on disk; returns the summary.

    Raises:
        InvalidInputError: no finished run there, or one whose figures are not made from what is on disk.
    """
    path = check_path("the folder of a run", path)
    directory = _open(path)
    with directory.held():
        if not (path / "summary.json").exists():
            if not (path / "config.json").exists():
                raise InvalidInputError(f"{path} is no finished run: nothing had begun; give the first command again")
            raise InvalidInputError(
                f"{path} is not finished: it has no summary.json; {directory.resume_command} goes on with it"
            )
        return _experiment(directory)[0].report(directory)


def _results(path: Path, values: Mapping[str, Any]) -> str:
    """Where the results of a finished run are, by what is there, and whether `report` would draw them again."""
    there = " and ".join(f"{path / name}" for name in RESULTS if (path / name).exists())
    own = values.get("reward", "half-plane") != "half-plane" and not (path / "report.html").exists()
    compared = values.get("compare")  # neither a tilt for a reward of the user's own nor a comparison is drawn again
    again = "" if own or compared else f"; `implicit-diffusion report {shlex.quote(str(path))}` draws it again"
    return f"its results are in {there}{again}"


def _open(path: Path) -> RunDirectory:
    if not path.is_dir():
        raise InvalidInputError(f"there is no run {path}; name the folder that --out named")
    if any(path.glob("beta-*")):
        raise InvalidInputError(f"{path} is a sweep: the `sweep` command that began it goes on with it")
    if not (path / "config.json").exists() and path.name in PARTS and (path.parent / "config.json").exists():
        raise InvalidInputError(f"{path} is a part of a run; name the run itself, {path.parent}")
    return RunDirectory(path)


def _experiment(directory: RunDirectory) -> tuple[Experiment, dict[str, Any]]:
    """The experiment that a run belongs to, by the options in its config.json, and these."""
    from implicit_diffusion.commands.ebm import command as ebm
    from implicit_diffusion.commands.ebm import config as ebm_config
    from implicit_diffusion.commands.finetune import command as finetune
    from implicit_diffusion.commands.finetune import config as finetune_config
    from implicit_diffusion.commands.hexagon import command as hexagon
    from implicit_diffusion.commands.hexagon import config as hexagon_config
    from implicit_diffusion.commands.pretrain import command as pretrain
    from implicit_diffusion.commands.pretrain import config as pretrain_config
    from implicit_diffusion.commands.recovery import command as recovery
    from implicit_diffusion.commands.tilt import command as tilt

    values = directory.read_config()
    for experiment in (
        Experiment(finetune_config.Config, finetune.run, finetune.report, "report.html"),
        Experiment(ebm_config.Config, ebm.run, ebm.report, "report.html"),
        Experiment(pretrain_config.Config, pretrain.run, pretrain.report, "summary.json"),
        Experiment(tilt.Config, tilt.run, tilt.report, "summary.json"),
        Experiment(recovery.Config, recovery.run, recovery.report, "summary.json"),
        Experiment(hexagon_config.Config, hexagon.run, hexagon.report, "summary.json"),
    ):
        if values is not None and values.keys() == {field.name for field in dataclasses.fields(experiment.config)}:
            return experiment, values
    raise InvalidInputError(
        f"{directory.path}/config.json belongs to no experiment of this release that can be resumed or drawn again"
    )
