"""What a run depends on, recorded when it begins and compared when it is resumed.

    provenance.json   the options; sha256 of every input; versions; threads; device; changes accepted since

A run that is resumed with another model, reward, file of data or version of torch is neither the old run nor a new one,
and nothing in its results would say so. `verify` names what was and what is, and refuses a change unless it is
accepted. For the same bits the number of threads counts too: it decides how sums are rounded, and is set back to what
it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch

from implicit_diffusion import __version__
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.files.fingerprints import Input, fingerprint, fingerprint_now, is_fingerprint, relative
from implicit_diffusion.files.reading import read_json
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import differences, records, surroundings
from implicit_diffusion.runs.differences import Difference
from implicit_diffusion.runs.directory import RunDirectory

PROVENANCE_FILE = "provenance.json"

Change = Literal["config", "model", "reference", "reward", "prompts", "data", "versions", "device", "provenance"]
"""What may be accepted as changed."""


@main_only
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
        config: all options, as they go into config.json.
        inputs: by a name of `Change`, which words may follow. Files inside the run directory may move with it.
        device: that the run computes on; None for the CPU.
        accepted: changes that were accepted before, as `forget` returned them; those of a file that is there stay too.

    Raises:
        InvalidInputError: an input that cannot be read.
    """
    accepted = [*accepted, *_accepted(directory)]
    prints = {name: relative(fingerprint(source), directory.path) for name, source in inputs.items()}
    device = device or torch.device("cpu")
    records.write(
        directory.path / PROVENANCE_FILE,
        {
            "config": config,
            "inputs": prints,
            "versions": surroundings.versions(),
            "threads": torch.get_num_threads(),
            "device": {"name": str(device), "kind": surroundings.kind(device)},
            "accepted": accepted,
        },
    )


@main_only
def forget(directory: RunDirectory) -> list[str]:
    """Remove provenance.json before config.json is written again: a run that ends in between must not look changed.

    Returns:
        The changes that were accepted in it.
    """
    accepted = _accepted(directory)
    with writing(directory.path / PROVENANCE_FILE):
        (directory.path / PROVENANCE_FILE).unlink(missing_ok=True)
    return accepted


@main_only
def is_recorded(directory: RunDirectory) -> bool:
    """Whether provenance.json is there."""
    return (directory.path / PROVENANCE_FILE).is_file()


def recorded_inputs(directory: RunDirectory) -> dict[str, Any]:
    """The fingerprints of what the run reads; none where nothing is recorded.

    Raises:
        InvalidInputError: provenance.json is damaged.
    """
    return dict(_read(directory)["inputs"]) if is_recorded(directory) else {}


@main_only
def check_version(directory: RunDirectory, accept_changes: Collection[str] = (), advice: str | None = None) -> None:
    """Refuse a run that another version of this library began, whose options may have meant something else.

    Args:
        directory: of the run.
        accept_changes: names of `Change`; with "versions" among them, any version will do.
        advice: what to do with that version, in place of accepting this one.

    Raises:
        InvalidInputError: a run of another version; the message names both.
    """
    origin = directory.read_origin()
    if origin is not None and origin.version != __version__ and "versions" not in accept_changes:
        other = advice or "continue bit for bit with that version, or add `accept_changes=['versions']`"
        raise InvalidInputError(
            f"{directory.path} was begun by {surroundings.OURS} {origin.version}; this is {__version__}: {other}"
        )


@contextmanager
def verified(
    directory: RunDirectory,
    accept_changes: Collection[str] = (),
    inputs: Mapping[str, Input] | None = None,
    advice: str | None = None,
) -> Iterator[None]:
    """`verify`, and inside the block as many threads as the run began with."""
    here = torch.get_num_threads()
    threads = verify(directory, accept_changes, inputs, advice)
    if threads != here:
        print(f"threads   {threads}, as when the run began; {here} are usual here, and would round otherwise")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(here)


@main_only
def verify(
    directory: RunDirectory,
    accept_changes: Collection[str] = (),
    inputs: Mapping[str, Input] | None = None,
    advice: str | None = None,
) -> int:
    """Compare what a run depends on with what is there now; only files are read, and nothing is executed.

    Args:
        directory: of the run.
        accept_changes: names of `Change`; such differences are printed and recorded, and the run continues.
        inputs: what the run would read now; what is not among them is looked at where it was.
        advice: what to do about a difference, in place of accepting it.

    Returns:
        The number of threads that the run began with.

    Raises:
        InvalidInputError: a difference that is not accepted, or a damaged provenance.json.
    """
    if not is_recorded(directory):
        missing = f"it has no {PROVENANCE_FILE}, which says what that was: an earlier release began it"
        trained = (directory.path / "metrics.jsonl", *directory.path.glob("beta-*/checkpoint/*"))
        if directory.has_state or any(path.exists() for path in trained):
            _refuse_or_accept(directory, [Difference("provenance", missing)], accept_changes, advice)
        return torch.get_num_threads()
    saved = _read(directory)
    before = {name: {} for name in inputs or {}} | saved["inputs"]  # what it did not read before has changed as well
    now = {name: _now(name, entry, directory, inputs or {}) for name, entry in before.items()}
    changed = [
        *differences.of_config(directory, saved["config"]),
        *differences.of_inputs(directory.path, before, now),
        *differences.of_surroundings(saved["versions"], saved["device"]),
    ]
    _refuse_or_accept(directory, changed, accept_changes, advice)
    if changed:
        records.write(directory.path / PROVENANCE_FILE, _renewed(directory, saved, now, changed))
    return int(saved["threads"])


@main_only
def check_inputs(directory: RunDirectory, inputs: Mapping[str, Input]) -> None:
    """Refuse inputs that are not those of the run: a folder from elsewhere may name any file of its reader.

    Args:
        directory: of the run.
        inputs: that are about to be read, by a name of `Change`, which words may follow. What else the run has read
            under that name, such as the modules that a reward imports, is looked at where it was.

    Raises:
        InvalidInputError: an input that has changed, or that provenance.json does not have.
    """
    saved = _read(directory)["inputs"] if is_recorded(directory) else {}
    kinds = {name.partition(" ")[0] for name in inputs}
    before = {name: {} for name in inputs} | {
        name: entry for name, entry in saved.items() if name.partition(" ")[0] in kinds
    }
    now = {name: _now(name, entry, directory, inputs) for name, entry in before.items()}
    _refuse_or_accept(directory, [*differences.of_inputs(directory.path, before, now)], (), "begin a new run")


@main_only
def device_of(directory: RunDirectory) -> str | None:
    """The device that the run continues on, where provenance.json names one."""
    return _read(directory)["device"]["name"] if is_recorded(directory) else None


def _accepted(directory: RunDirectory) -> list[str]:
    if is_recorded(directory):
        with suppress(InvalidInputError):  # a damaged one
            return list(_read(directory)["accepted"])
    return []


def _now(name: str, entry: dict[str, Any], directory: RunDirectory, given: Mapping[str, Input]) -> dict[str, Any]:
    """The fingerprint of an input that had the fingerprint `entry`."""
    if name in given:
        return relative(fingerprint(given[name]), directory.path)
    return fingerprint_now(entry, directory.path) if "files" in entry else entry


def _refuse_or_accept(
    directory: RunDirectory, changed: list[Difference], accept_changes: Collection[str], advice: str | None
) -> None:
    refused = [difference for difference in changed if difference.change not in accept_changes]
    if refused:
        names = [name for name in get_args(Change) if name in {difference.change for difference in refused}]
        raise InvalidInputError(
            f"{directory.path} depends on what has changed since it began: {'; '.join(d.line for d in refused)}. Put "
            f"that back to continue the run bit for bit, or {advice or f'add `accept_changes={names}`'}"
        )
    for difference in changed:
        print(f"accepted  {difference.line}")


def _renewed(
    directory: RunDirectory, saved: dict[str, Any], inputs: dict[str, Any], changed: list[Difference]
) -> dict[str, Any]:
    """What the run depends on from now on, and what was accepted."""
    names = {difference.change for difference in changed}
    now = dict(saved) | {"accepted": [*saved["accepted"], *(difference.line for difference in changed)]}
    if "config" in names:
        now["config"] = directory.read_config()
    now["inputs"] = inputs
    now["versions"] = surroundings.versions()
    if "device" in names:
        kind = surroundings.kind_of(saved["device"]["name"])
        name = saved["device"]["name"] if kind else surroundings.usual_device()
        now["device"] = {"name": name, "kind": kind or surroundings.kind_of(name)}
    return now


def _read(directory: RunDirectory) -> dict[str, Any]:
    path = directory.path / PROVENANCE_FILE
    try:
        saved = read_json(path)
        known = {"config": dict, "inputs": dict, "versions": dict, "threads": int, "device": dict, "accepted": list}
        wrong = [name for name, kind in known.items() if not isinstance(saved[name], kind)]
        wrong += [f"inputs.{name}" for name, entry in saved["inputs"].items() if not is_fingerprint(entry)]
        if wrong or saved["threads"] < 1 or not {"name", "kind"} <= saved["device"].keys():
            raise ValueError(f"{', '.join(wrong) or 'threads or device'} cannot be what was written")
        return dict(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{path} is damaged: {error}") from error
