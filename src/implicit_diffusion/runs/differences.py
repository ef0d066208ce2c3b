"""Differences between what a run began with and what is there now, each in a line that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.fingerprints import short_digest
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.runs import surroundings
from implicit_diffusion.runs.directory import RunDirectory

NAMED = 3  # files of one input that are named; the others are counted


@dataclass(frozen=True)
class Difference:
    """One difference.

    Args:
        change: its name in `runs.provenance.Change`.
        line: what was and what is, in words.
    """

    change: str
    line: str


def of_config(directory: RunDirectory, before: Mapping[str, Any]) -> Iterator[Difference]:
    """Options that differ from those in config.json.

    Raises:
        InvalidInputError: config.json is gone or damaged.
    """
    now = directory.read_config()
    if now is None:
        raise InvalidInputError(f"{directory.path / 'config.json'} cannot be read: {_why(directory)}")
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield Difference("config", f"config.json: {key} was {before.get(key)!r} and is {now.get(key)!r}")


def _why(directory: RunDirectory) -> str:
    try:
        read_json(directory.path / "config.json")
    except InvalidInputError as error:
        return str(error)
    return "it holds no configuration"


def of_inputs(folder: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    """Files and tensors whose fingerprints differ.

    Args:
        folder: of the run; paths may be relative to it.
        before: fingerprints by the name of the input.
        after: those of the same inputs now.
    """
    for name, was in before.items():
        now, change = after[name], name.partition(" ")[0]
        if was.get("tensor") != now.get("tensor"):
            yield Difference(
                change, f"{name} was {short_digest(was.get('tensor'))} and is {short_digest(now.get('tensor'))}"
            )
        if was.get("version") != now.get("version"):
            yield Difference(change, f"{name} was {was.get('version')} and is {now.get('version')}")
        old, new = was.get("files", {}), now.get("files", {})
        different = [file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
        for file in different[:NAMED]:
            path = folder / now.get("folder", "") / file
            yield Difference(
                change, f"{name}: {path} was {short_digest(old.get(file))} and is {short_digest(new.get(file))}"
            )
        if len(different) > NAMED:
            yield Difference(change, f"{name}: {len(different) - NAMED} more files differ")


def of_surroundings(versions: Mapping[str, str], device: Mapping[str, str]) -> Iterator[Difference]:
    """Packages of another version, and a device that is of another kind, or gone.

    Args:
        versions: by package, when the run began.
        device: `name` and `kind` of the device that the run began on.
    """
    now = surroundings.versions()
    for package in sorted(versions.keys() | now.keys()):
        was, is_now = versions.get(package), now.get(package)
        if was != is_now:
            yield Difference("versions", f"{package} was {was} and is {is_now}")
    was, is_now = device["kind"], surroundings.kind_of(device["name"])
    if was != is_now:
        yield Difference("device", f"device {device['name']} was {was} and is {is_now or 'not here'}")
