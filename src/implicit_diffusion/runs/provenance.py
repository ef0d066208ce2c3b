"""What a run rests on, written down when it begins and compared when it goes on.

    provenance.json   the configuration; sha256 of every input; versions; threads; device; changes accepted since

A run that goes on with another model, reward, file of data or version of torch is neither the old run nor a new one,
and nothing in its results would say so. `verify` names what was and what is, and refuses unless that change is
accepted. Bit for bit needs the number of threads too: it decides how sums are rounded, and is set back to what it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import replacing, writing
from implicit_diffusion.files.fingerprints import Input, again, fingerprint, is_fingerprint, relative, short
from implicit_diffusion.runs.directory import RunDirectory, plain

FILE = "provenance.json"
PACKAGES = ("implicit-diffusion", "diffusers", "numpy", "safetensors")
SHOWN = 3  # differences that are named of one kind

Change = Literal["config", "model", "reference", "reward", "prompts", "data", "versions", "device", "provenance"]
"""What may be accepted as changed."""


def record(
    directory: RunDirectory,
    config: Any,
    inputs: Mapping[str, Input],
    *,
    device: torch.device | None = None,
    accepted: Collection[str] = (),
) -> None:
    """Write provenance.json, when config.json is written.

    Args:
        directory: of the run.
        config: all that was asked, as it goes into config.json.
        inputs: by a name of `Change`, which words may follow. Files inside the run directory may move with it.
        device: that the run computes on; None for the CPU.
        accepted: changes that were accepted before, as `forget` returned them; those of a file that is there stay too.

    Raises:
        InvalidInputError: an input that cannot be read.
    """
    accepted = [*accepted, *_accepted(directory)]
    prints = {name: relative(fingerprint(source), directory.path) for name, source in inputs.items()}
    _write(
        directory,
        {
            "config": plain(config),
            "inputs": prints,
            "versions": _versions(),
            "threads": torch.get_num_threads(),
            "device": {"name": str(device or "cpu"), "kind": _kind(device or torch.device("cpu"))},
            "accepted": accepted,
        },
    )


def forget(directory: RunDirectory) -> list[str]:
    """Take provenance.json away before config.json is written anew: an end in between must not look like a change.

    Returns:
        The changes that were accepted in it.
    """
    accepted = _accepted(directory)
    with writing(directory.path / FILE):
        (directory.path / FILE).unlink(missing_ok=True)
    return accepted


def surroundings(device: torch.device) -> dict[str, str]:
    """What decides rounding beside the numbers themselves: device, threads and versions, each in words."""
    return {"device": f"{device.type}, {_kind(device)}", "threads": str(torch.get_num_threads()), **_versions()}


def is_recorded(directory: RunDirectory) -> bool:
    """Whether provenance.json is there."""
    return (directory.path / FILE).is_file()


@contextmanager
def verified(
    directory: RunDirectory,
    accept: Collection[str] = (),
    inputs: Mapping[str, Input] | None = None,
    advice: str | None = None,
) -> Iterator[None]:
    """`verify`, and inside the block as many threads as the run began with."""
    here = torch.get_num_threads()
    threads = verify(directory, accept, inputs, advice)
    if threads != here:
        print(f"threads   {threads}, as when the run began; {here} are usual here, and would round otherwise")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(here)


def verify(
    directory: RunDirectory,
    accept: Collection[str] = (),
    inputs: Mapping[str, Input] | None = None,
    advice: str | None = None,
) -> int:
    """Compare what a run rests on with what is there now; nothing is read but files, and nothing executed.

    Args:
        directory: of the run.
        accept: names of `Change`; such differences are said and written down, and the run goes on.
        inputs: what the run would read now; what is not among them is looked at where it was.
        advice: what to do about a difference, in place of accepting it.

    Returns:
        The number of threads that the run began with.

    Raises:
        InvalidInputError: a difference that is not accepted, or a damaged provenance.json.
    """
    if not is_recorded(directory):
        missing = f"it has no {FILE}, which says what that was: an earlier release began it"
        trained = (directory.path / "metrics.jsonl", *directory.path.glob("beta-*/checkpoint/*"))
        if directory.has_state or any(path.exists() for path in trained):
            _refuse_or_say(directory, [Difference("provenance", missing)], accept, advice)
        return torch.get_num_threads()
    saved = _read(directory)
    now = {name: _now(name, entry, directory, inputs or {}) for name, entry in saved["inputs"].items()}
    differences = [*_config(directory, saved), *_inputs(directory, saved["inputs"], now), *_surroundings(saved)]
    _refuse_or_say(directory, differences, accept, advice)
    if differences:
        _write(directory, _renewed(directory, saved, now, differences))
    return int(saved["threads"])


@dataclass(frozen=True)
class Difference:
    """One difference: its name in `Change`, and a line that says what was and what is."""

    name: str
    line: str


def device_of(directory: RunDirectory) -> str | None:
    """The device that the run goes on with, where provenance.json says one."""
    return _read(directory)["device"]["name"] if is_recorded(directory) else None


def _accepted(directory: RunDirectory) -> list[str]:
    if is_recorded(directory):
        with suppress(InvalidInputError):  # a damaged one
            return list(_read(directory)["accepted"])
    return []


def _config(directory: RunDirectory, saved: dict[str, Any]) -> Iterator[Difference]:
    try:
        now = json.loads((directory.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{directory.path / 'config.json'} cannot be read: {error}") from error
    before = saved["config"]
    if not isinstance(now, dict):
        raise InvalidInputError(f"{directory.path / 'config.json'} holds no configuration")
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield Difference("config", f"config.json: {key} was {before.get(key)!r} and is {now.get(key)!r}")


def _now(name: str, entry: dict[str, Any], directory: RunDirectory, given: Mapping[str, Input]) -> dict[str, Any]:
    """The fingerprint of an input that had the fingerprint `entry`."""
    if name in given:
        return relative(fingerprint(given[name]), directory.path)
    return entry if "tensor" in entry else again(entry, directory.path)


def _inputs(directory: RunDirectory, before: dict[str, Any], after: dict[str, Any]) -> Iterator[Difference]:
    for name, was in before.items():
        now, kind = after[name], name.partition(" ")[0]
        if was.get("tensor") != now.get("tensor"):
            yield Difference(kind, f"{name} was {short(was.get('tensor'))} and is {short(now.get('tensor'))}")
        old, new = was.get("files", {}), now.get("files", {})
        different = [file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
        for file in different[:SHOWN]:
            path = directory.path / now.get("folder", "") / file
            yield Difference(kind, f"{name}: {path} was {short(old.get(file))} and is {short(new.get(file))}")
        if len(different) > SHOWN:
            yield Difference(kind, f"{name}: {len(different) - SHOWN} more files differ")


def _surroundings(saved: dict[str, Any]) -> Iterator[Difference]:
    now = _versions()
    for package in sorted(saved["versions"].keys() | now.keys()):
        was, is_now = saved["versions"].get(package), now.get(package)
        if was != is_now:
            yield Difference("versions", f"{package} was {was} and is {is_now}")
    was, is_now = saved["device"]["kind"], _kind_of_name(saved["device"]["name"])
    if was != is_now:
        yield Difference("device", f"device {saved['device']['name']} was {was} and is {is_now or 'not here'}")


def _refuse_or_say(
    directory: RunDirectory, differences: list[Difference], accept: Collection[str], advice: str | None
) -> None:
    refused = [found for found in differences if found.name not in accept]
    if refused:
        names = " ".join(name for name in get_args(Change) if name in {found.name for found in refused})
        raise InvalidInputError(
            f"{directory.path} does not rest on what it began with: {'; '.join(found.line for found in refused)}. Put "
            f"that back for the run to go on bit for bit, or {advice or f'add `--accept-changes {names}`'}"
        )
    for found in differences:
        print(f"accepted  {found.line}")


def _renewed(
    directory: RunDirectory, saved: dict[str, Any], inputs: dict[str, Any], differences: list[Difference]
) -> dict[str, Any]:
    """What the run rests on from now on, and what was accepted."""
    names = {found.name for found in differences}
    now = dict(saved) | {"accepted": [*saved["accepted"], *(found.line for found in differences)]}
    if "config" in names:
        now["config"] = json.loads((directory.path / "config.json").read_text(encoding="utf-8"))
    now["inputs"] = inputs
    now["versions"] = _versions()
    if "device" in names:
        kind = _kind_of_name(saved["device"]["name"])
        name = saved["device"]["name"] if kind else _usual()
        now["device"] = {"name": name, "kind": kind or _kind_of_name(name)}
    return now


def _versions() -> dict[str, str]:
    installed = {"torch": str(torch.__version__)}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # sources that are on the path, but not installed
            installed[name] = importlib.metadata.version(name)
    python = ".".join(platform.python_version_tuple()[:2])  # a patch release of Python changes no number
    return installed | {"python": python}


def _kind(device: torch.device) -> str:
    """What computes there: the instructions of the CPU, or the name of the accelerator, which decide rounding."""
    if device.type == "cpu":
        return f"cpu with {torch.backends.cpu.get_cpu_capability()}"
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def _kind_of_name(name: str) -> str | None:
    try:
        return _kind(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError, TypeError):
        return None


def _usual() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(accelerator or "cpu")


def _read(directory: RunDirectory) -> dict[str, Any]:
    path = directory.path / FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        known = {"config": dict, "inputs": dict, "versions": dict, "threads": int, "device": dict, "accepted": list}
        wrong = [name for name, kind in known.items() if not isinstance(saved[name], kind)]
        wrong += [f"inputs.{name}" for name, entry in saved["inputs"].items() if not is_fingerprint(entry)]
        if wrong or saved["threads"] < 1 or not {"name", "kind"} <= saved["device"].keys():
            raise ValueError(f"{', '.join(wrong) or 'threads or device'} cannot be what was written")
        return dict(saved)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInputError(f"{path} is damaged: {error}") from error


def _write(directory: RunDirectory, value: dict[str, Any]) -> None:
    with replacing(directory.path / FILE) as file:
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
