"""A model by its name: "digits", a diffusers folder, a hub id, FILE.py:factory, or a folder of such a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from implicit_diffusion.commands.rewards.trust import Code, loaded_with, spelled
from implicit_diffusion.commands.shared.models.factories import (
    code_of_model,
    factory_of,
    is_factory,
    models_in,
    open_own_model,
)
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.fingerprints import MODEL_FILES, fingerprint
from implicit_diffusion.models.checkpoints import find_checkpoint
from implicit_diffusion.models.own_models.opened import OwnModel, weights_digest
from implicit_diffusion.models.pretrained import Pretrained, load_pretrained
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.provenance import recorded_inputs


def open_model(name: str, *, frozen: bool = False) -> Pretrained:
    """The model called `name`.

    Args:
        name: see above.
        frozen: as in `load_pretrained`. A model of the user's own keeps the precision of its weights in any case.

    Raises:
        InvalidInputError: as in `load_pretrained` and `open_own_model`.
    """
    own = open_own_model(name)
    return load_pretrained(name, frozen=frozen) if own is None else own


def folder_of(name: str) -> Path | None:
    """The folder of a model; None for a factory, which has none.

    Raises:
        InvalidInputError: there is no such model.
    """
    if is_factory(name):
        return None
    return Path(name).expanduser() if factory_of(name) is not None else find_checkpoint(name).folder


def fingerprints_of(option: str, name: str) -> dict[str, Any]:
    """Fingerprints of all files that a model is made of, for `runs.provenance`; nothing is run.

    Args:
        option: that names it, "model" or "reference".
        name: of the model.

    Raises:
        InvalidInputError: there is no such model.
    """
    code = code_of_model(name)
    if code is None:
        return {option: fingerprint(find_checkpoint(name).folder, MODEL_FILES)}
    if is_factory(name):
        _, function, call = spelled(name)
        return {option: fingerprint(code.files), f"{option} factory": {"version": f"{function}{call}"}}
    return {option: fingerprint(Path(name).expanduser(), MODEL_FILES), f"{option} code": fingerprint(code.files)}


def imports_of(options: Any) -> dict[str, Any]:
    """Fingerprints of the modules beside factories that these have imported, once they have run."""
    beside: dict[str, Any] = {}
    for option, name in models_in(options).items():
        code: Code | None = code_of_model(name)
        if code is not None and (files := sorted(set(loaded_with(code)) - set(code.files))):
            beside[f"{option} imports"] = fingerprint(files)
    return beside


@main_only
def check_weights(directory: RunDirectory, weights: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose factory has now returned other weights than when the run began.

    Args:
        directory: of the run, which need not have begun.
        weights: from `weights_of`.

    Raises:
        InvalidInputError: they differ. No change of this kind can be accepted: u_0 would be another model.
    """
    began = recorded_inputs(directory)
    for name, entry in weights.items():
        if name in began and began[name] != entry:
            raise InvalidInputError(
                f"`{name.partition(' ')[0]}`: its factory returns other weights than when {directory.path} began; a "
                "factory must return the same ones at every call: load them from a file, or make them with a "
                "torch.Generator of its own"
            )


def weights_of(models: Mapping[str, Pretrained | None]) -> dict[str, Any]:
    """Fingerprints of the weights that factories have returned, which no file of ours holds.

    Args:
        models: by the option that names them, before anything is trained.
    """
    return {
        f"{option} weights": {"version": f"sha256 {weights_digest(model.denoiser.model)}"}
        for option, model in models.items()
        if isinstance(model, OwnModel)
    }
