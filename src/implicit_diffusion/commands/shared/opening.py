"""How every command begins a run, or continues one: its folder, and what is written before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from implicit_diffusion.commands.shared.inputs import absolute, inputs, record_inputs
from implicit_diffusion.errors import NOT_OF_THE_RUN, ImplicitDiffusionError, NonFiniteError
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.devices import naming_memory
from implicit_diffusion.runs.provenance import is_recorded
from implicit_diffusion.runs.trackers.opening import tracked

C = TypeVar("C")


def in_folder(config: C, directory: RunDirectory | None, otherwise: Path) -> tuple[C, RunDirectory]:
    """The config with absolute paths, and the folder of its run, which is not made here.

    Args:
        config: a dataclass with a field `out`.
        directory: of a run to continue; None for a new one.
        otherwise: where a new run goes whose config has no `out`.

    Raises:
        InvalidInputError: a path that cannot be used.
    """
    out = directory.path if directory else getattr(config, "out") or otherwise  # noqa: B009
    config = absolute(replace(config, out=out))  # type: ignore[type-var]
    return config, RunDirectory(getattr(config, "out"))  # noqa: B009


@contextmanager
def opened(
    command: str,
    config: Any,
    directory: RunDirectory,
    *,
    resumed: bool,
    fingerprints: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Write config.json and provenance.json where they are missing; errors and interruptions then say how to resume.

    Args:
        command: that begins the run.
        config: resolved, as it goes into config.json.
        directory: of the run, held.
        resumed: whether the run is continued; a new one needs an empty folder.
        fingerprints: of the inputs, taken before these were read; by default they are taken now.
        device: that the run computes on; None for the CPU.

    Raises:
        InvalidInputError: a new run in a folder with something in it.
    """
    if not resumed:
        directory.start(command, config)
    with continuing(directory):
        if not (resumed and is_recorded(directory)):
            record_inputs(directory, config, inputs(config) if fingerprints is None else fingerprints, device=device)
        yield


@contextmanager
def study(command: str, config: C, directory: RunDirectory | None) -> Iterator[tuple[C, RunDirectory]]:
    """Hold, track and open the folder of a run of many trainings, whose inputs are all in its config.

    Args:
        command: that begins the run.
        config: resolved.
        directory: of a run to continue; None begins a new one.

    Yields:
        The config with absolute paths, and the folder.

    Raises:
        InvalidInputError: as `in_folder` and `opened`.
    """
    resumed = directory is not None
    config, directory = in_folder(config, directory, dated(command))
    with (
        directory.held(),
        tracked(directory, getattr(config, "track")) as directory,  # noqa: B009
        opened(command, config, directory, resumed=resumed),
    ):
        yield config, directory


@contextmanager
def continuing(directory: RunDirectory, again: str | None = None) -> Iterator[None]:
    """Say what continues the work, in every error that ends the block early, once config.json is there.

    Errors that nobody expected are raised as they are, with that as a note.

    Args:
        directory: of the work, held.
        again: such as "the same command continues the sweep"; None where `resume` continues it.
    """
    way = again or f"{directory.resume_command} continues the run"
    known = (NonFiniteError,) if again is None else (NonFiniteError, *NOT_OF_THE_RUN)
    try:
        with naming_memory(), directory.resumable() if again is None else nullcontext():
            yield
    except KeyboardInterrupt as error:
        if again is None:
            raise
        raise KeyboardInterrupt(f"interrupted; {again}") from error
    except ImplicitDiffusionError as error:
        if not isinstance(error, known) or not (directory.path / "config.json").exists():
            raise
        raise type(error)(f"{error}; once its cause is mended, {way}") from error
    except Exception as error:
        error.add_note(f"once its cause is mended, {way}")
        raise


@main_only
def dated(name: str) -> Path:
    """The default folder of a run: runs/`name`-<UTC time>, by the clock of the main process."""
    return Path(f"runs/{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}")
