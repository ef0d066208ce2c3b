"""Find the folder that a model's name stands for, and look at it before anything is loaded.

A name is "digits" (the model that comes with this package), a local folder, or a hub id `owner/name`. The folder must
be a diffusers pipeline of a known family (`families`): `model_index.json`, a network with safetensors weights, a
scheduler, and what the family has besides, a decoder and text encoders.

Nothing in a checkpoint is ever executed: weights are safetensors, never pickles; the classes named in
`model_index.json` are looked up in diffusers and transformers and nowhere else. A local folder never touches the
network. A hub id is first looked for in the local cache; only if it is not there does one request with a short timeout
ask the hub, so that a closed network is an error after seconds. `HF_HUB_OFFLINE=1` skips the request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from implicit_diffusion.denoisers.families import FAMILIES, PIXELS, Family, family_of
from implicit_diffusion.errors import InvalidInputError

DIGITS = Path(__file__).parent.parent / "assets" / "digits"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_TIMEOUT = 5.0  # seconds until the hub counts as out of reach
FLAT_FILES = ("*.json", "*.safetensors")  # of old repositories of pixel models, with all parts in one folder
PART_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
VARIANTS = ("*.fp16*", "*.non_ema*")  # never loaded
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been looked at.

    Args:
        network: where the network is.
        scheduler: where the scheduler is.
        scheduler_class: its class in diffusers.
        family: which kind of pipeline it is.
        folder: of all of it.
        index: its model_index.json.
    """

    network: Path
    scheduler: Path
    scheduler_class: str
    family: Family = PIXELS
    folder: Path = Path()
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """The parts that are there: name → (library, class)."""
        return _parts(self.index)


def find_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint called `model`: "digits", a folder, or a hub id.

    Raises:
        InvalidInputError: nothing of that name exists or can be reached, or what is there is no diffusers pipeline of
            a known family with safetensors weights. The message says what was found and what to do.
    """
    if model == "digits":
        return inspect_folder(DIGITS)
    if str(model) and Path(model).is_dir():
        return inspect_folder(Path(model))
    if isinstance(model, str) and HUB_ID.fullmatch(model) and not Path(model).exists():
        return _from_hub(model)
    raise InvalidInputError(
        f"model: {str(model)!r} is no folder; give 'digits', a diffusers folder, or a hub id 'owner/name'."
    )


def inspect_folder(folder: Path) -> Checkpoint:
    """Check a diffusers folder without loading anything.

    Both layouts of diffusers are understood: parts in folders of their own, or (older hub repositories) network and
    scheduler in the folder itself.

    Raises:
        InvalidInputError: see `find_checkpoint`.
    """
    family, index = _read_index(folder)
    network, scheduler = (folder / part if (folder / part).is_dir() else folder for part in (family.part, "scheduler"))
    others = sorted(_parts(index).keys() - {family.part, "scheduler"})
    for needed in (network / "config.json", scheduler / "scheduler_config.json", *(folder / part for part in others)):
        if not needed.exists():
            raise InvalidInputError(
                f"model: {folder} lacks {needed.relative_to(folder)}, which its model_index.json promises; "
                f"it holds {_listing(folder)}."
            )
    for holder in (network, *(folder / part for part in family.needs)):
        _require_safetensors(str(folder), (path.name for path in holder.iterdir()))
    return Checkpoint(network, scheduler, _parts(index)["scheduler"][1], family, folder, index)


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    pairs = {name: tuple(where) for name, where in index.items() if isinstance(where, list) and len(where) == 2}
    return {name: where for name, where in pairs.items() if all(isinstance(word, str) for word in where)}


def _read_index(folder: Path) -> tuple[Family, dict[str, Any]]:
    """`model_index.json` and the family of the pipeline that it describes, if that is one that is known."""
    path = folder / "model_index.json"
    if (folder / "model").is_dir() and not path.is_file():
        raise InvalidInputError(f"model: {folder} is the folder of a run; its model is {folder / 'model'}.")
    if not path.is_file():
        raise InvalidInputError(
            f"model: {folder} is no diffusers pipeline: it has no model_index.json; it holds {_listing(folder)}. "
            "Save a whole pipeline there, DDPMPipeline(unet=..., scheduler=...).save_pretrained(folder)."
        )
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        pipeline = index["_class_name"]
        parts = _parts(index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"model: {path} is no valid model index ({error}).") from error
    family = family_of(pipeline, parts)
    if family is None:
        found = ", ".join(f"{name}: {where[-1]}" for name, where in parts.items()) or "nothing"
        known = ", ".join(name for family in FAMILIES for name in family.pipelines)
        raise InvalidInputError(
            f"model: {folder} is a {pipeline} with {found}. What can be fine-tuned are pipelines of a UNet2DModel and "
            f"a scheduler (DDPMPipeline, DDIMPipeline), and {known} with all their parts; any other network in "
            "Python, as a denoiser u(x, t, **condition) of a Chain (docs/howto/extend.md)."
        )
    for name, (library, code) in parts.items():
        if library not in ("diffusers", "transformers") and (name, library) != ("safety_checker", "stable_diffusion"):
            raise InvalidInputError(
                f"model: {folder} brings its own {name} code ({library}.{code}), and code from checkpoints is "
                f"never run; use a {name} of diffusers."
            )
    return family, index


def _require_safetensors(where: str, names: Iterable[str]) -> None:
    """Raise unless one of the files `names` holds weights that can be read without executing them."""
    names = sorted(names)
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise InvalidInputError(
            f"model: {where} holds only pickled weights ({', '.join(pickles)}), and loading a pickle can run any code. "
            "If you trust the file, convert it once: DDPMPipeline.from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(new_folder)."
        )
    raise InvalidInputError(f"model: {where} holds no *.safetensors weights; it holds {', '.join(names) or 'nothing'}.")


def _listing(folder: Path, limit: int = 12) -> str:
    """The folder's entries for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir()) if folder.is_dir() else []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _from_hub(hub_id: str) -> Checkpoint:
    """From the local cache where it is complete, else from the hub."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return inspect_folder(Path(snapshot_download(hub_id, local_files_only=True)))
    except (LocalEntryNotFoundError, InvalidInputError):
        pass  # not cached, or not completely

    advice = (
        f"There is no folder {hub_id!r} here, and it is not in the local cache of the hub. Download it where there is "
        f"a network (`hf download {hub_id} --local-dir FOLDER`) and give the folder, or use 'digits'."
    )
    try:
        # One request that is not repeated; the downloads below are, with growing pauses.
        siblings = HfApi().model_info(hub_id, timeout=HUB_TIMEOUT).siblings or []
    except RepositoryNotFoundError as error:
        raise InvalidInputError(f"model: the hub has no public model {hub_id!r}. {advice}") from error
    except Exception as error:  # whatever the HTTP library of the day raises
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
        raise InvalidInputError(f"model: {hub_id!r} cannot be reached on the hub ({reason}). {advice}") from error
    names = [sibling.rfilename for sibling in siblings]
    wanted: tuple[str, ...] = FLAT_FILES
    if "model_index.json" in names:
        index = _read_index(Path(snapshot_download(hub_id, allow_patterns=["model_index.json"])))[1]
        in_folders = [part for part in _parts(index) if any(name.startswith(f"{part}/") for name in names)]
        parts = [f"{part}/{pattern}" for part in in_folders for pattern in PART_FILES]
        wanted = ("model_index.json", *parts) if in_folders else FLAT_FILES
    _require_safetensors(hub_id, names)
    folder = snapshot_download(hub_id, allow_patterns=list(wanted), ignore_patterns=list(VARIANTS))
    return inspect_folder(Path(folder))
