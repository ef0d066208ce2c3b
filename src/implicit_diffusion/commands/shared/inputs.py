"""What a run reads: absolute paths of its inputs, and fingerprints of what they hold.

Paths are made absolute when a run begins, so that it can be resumed from anywhere, and a reward that changes the
working directory does not redirect it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from implicit_diffusion.commands.rewards import trust as reward_trust
from implicit_diffusion.commands.rewards.weights import functions_in, with_absolute_names
from implicit_diffusion.commands.shared.arrays.array_files import place_of
from implicit_diffusion.commands.shared.arrays.idx import PACKAGES
from implicit_diffusion.commands.shared.models.by_name import fingerprints_of, imports_of
from implicit_diffusion.commands.shared.models.factories import is_factory
from implicit_diffusion.errors import InvalidInputError, check_path
from implicit_diffusion.files.fingerprints import MODEL_FILES, fingerprint
from implicit_diffusion.models.image_text import find_image_text
from implicit_diffusion.potentials.plane import LAWS
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.provenance import forget, record
from implicit_diffusion.scorers import versions

NAMES = {
    "model": {"digits"},
    "reference": {"digits"},
    "data": {"digits", *LAWS, *PACKAGES},
}  # that are not paths, whatever is there
INIT_LORA = "initial adapter"
C = TypeVar("C")


def absolute(config: C) -> C:
    """The config with absolute paths: each `Path`, and each name that stands for a file or a folder."""
    changed: dict[str, Any] = {}
    for field in fields(config):  # type: ignore[arg-type]  # a dataclass
        value = getattr(config, field.name)
        if isinstance(value, os.PathLike) or ("Path" in str(field.type) and value is not None):
            changed[field.name] = check_path(f"--{field.name}", value).absolute()
        elif field.name in ("model", "reference") and is_factory(value):
            changed[field.name] = reward_trust.absolute(value)
        elif _is_place(field.name, value):
            changed[field.name] = str(Path(value).absolute())
        elif field.name == "reward":
            one = isinstance(value, str)
            changed[field.name] = reward_trust.absolute(value) if one else with_absolute_names(value)
        elif field.name == "judge":
            changed[field.name] = tuple(map(reward_trust.absolute, value))
    return replace(config, **changed)  # type: ignore[type-var]


@main_only
def inputs(config: Any) -> dict[str, Any]:
    """Fingerprints of all that a config names, for `record` and `verify`; what is shipped has none.

    Model, reference, initial adapter, data, rewards and judges.

    Raises:
        InvalidInputError: there is no such model or reward, or a file that cannot be read.
    """
    fingerprints: dict[str, Any] = {}
    for name in ("model", "reference"):
        value = getattr(config, name, None)
        if isinstance(value, Path) and value.is_dir():
            fingerprints[name] = fingerprint(value, MODEL_FILES)
        elif isinstance(value, str) and value not in NAMES[name]:
            fingerprints |= fingerprints_of(name, value)
    if (adapter := getattr(config, "init_lora", None)) is not None:
        fingerprints[INIT_LORA] = fingerprint(adapter, MODEL_FILES)
    data = getattr(config, "data", None)
    if data in PACKAGES and PACKAGES[data].is_dir():
        fingerprints["data"] = fingerprint(PACKAGES[data])
    elif _is_place("data", data):
        fingerprints["data"] = fingerprint(Path(place_of(str(data))[0]))
    if own := _own_rewards(config):
        fingerprints["reward"] = fingerprint(sorted({file for code in own for file in code.files}))
        if (python := getattr(config, "reward_python", None)) is not None:
            fingerprints["reward python"] = {"version": versions(python)}
    names = functions_in(config)
    for name in names:
        if model := reward_trust.image_text_model(name):
            which = "reward" if len(names) == 1 else f"reward {reward_trust.short(name)}"
            fingerprints[which] = fingerprint(_image_text_folder(name, model, config), MODEL_FILES)
    return fingerprints


def _image_text_folder(name: str, model: str, options: Any) -> Path:
    """The folder of clip:MODEL; errors name the reward or judge, not the option `model`, which is another thing."""
    try:
        return find_image_text(model).folder
    except InvalidInputError as error:
        option = "judge" if name in getattr(options, "judge", ()) else "reward"
        raise InvalidInputError(
            f"`{option}` {reward_trust.short(name)}: {str(error).removeprefix('model: ')}"
        ) from error


def _own_rewards(options: Any) -> list[reward_trust.Code]:
    """The code of the rewards and judges among the options that is the user's own."""
    python = getattr(options, "reward_python", None)
    return [reward_trust.code_of(name, python) for name in functions_in(options) if reward_trust.is_own(name)]


@main_only
def record_inputs(
    directory: RunDirectory,
    options: Any,
    fingerprints: dict[str, Any],
    *,
    config: Any = None,
    device: torch.device | None = None,
    accepted: Collection[str] = (),
) -> None:
    """`record` for a run whose code is loaded: modules that it has imported from its own folder count as well.

    Args:
        directory: of the run.
        options: of the run, with the name of its reward where it has one.
        fingerprints: from `inputs`, before anything was loaded, and further ones.
        config: as it goes into config.json; by default the options.
        device: that the run computes on; None for the CPU.
        accepted: changes that were accepted before.
    """
    asked = options if config is None else config
    record(directory, asked, with_imports(options, fingerprints), device=device, accepted=accepted)


@main_only
def begin(
    directory: RunDirectory, command: str, config: Any, fingerprints: dict[str, Any], device: torch.device
) -> None:
    """Write config.json, then `record_inputs`; a run that ends in between has no provenance, not a wrong one."""
    with directory.resumable():
        accepted = forget(directory)
        directory.write_config(config, command)
        record_inputs(directory, config, fingerprints, device=device, accepted=accepted)


def with_imports(options: Any, fingerprints: dict[str, Any]) -> dict[str, Any]:
    """The fingerprints, with those of the modules that loaded rewards and models have imported from their folders."""
    own = _own_rewards(options)
    beside = {file for code in own for file in reward_trust.loaded_with(code)}
    beside -= {file for code in own for file in code.files}
    imports = {"reward imports": fingerprint(sorted(beside))} if beside else {}
    return fingerprints | imports | imports_of(options)


def _is_place(name: str, value: object) -> bool:
    """Whether a value names a file or a folder: a pipe or a device is neither, and hashing it might never end."""
    named = name in NAMES and isinstance(value, str) and value not in {"", *NAMES[name]}
    if not named:
        return False
    file, _ = place_of(str(value))
    return os.path.isfile(file) or os.path.isdir(file)
