"""Find the folder of a model by its name, and check it before anything is loaded.

A name is "digits" (the model that comes with this package), a local folder, or a hub id `owner/name`. The folder must
be a diffusers pipeline of a known family (`families`): `model_index.json`, a network with safetensors weights, a
scheduler, and the other parts of the family, such as a decoder and text encoders. `pipeline_files` says which of its
files these are.

Nothing in a checkpoint is ever executed: weights are safetensors, never pickles; the classes named in
`model_index.json` are looked up in diffusers and transformers and nowhere else. A local folder never uses the
internet. A hub id is first looked for in the local cache; only if it is not there, one request with a short timeout
goes to the hub, so that without internet access there is an error after seconds. `HF_HUB_OFFLINE=1` skips the request.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError, shown
from implicit_diffusion.extras import require
from implicit_diffusion.files.foreign import inside
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.models.families import PIXELS, PipelineFamily, family_of, probed_family
from implicit_diffusion.models.pipeline_files import (
    Source,
    laid_out,
    listing,
    located,
    names_in,
    needed,
    no_weights,
    weights,
)
from implicit_diffusion.showing import Shown

DIGITS = Path(__file__).parents[1] / "digits" / "assets" / "digits"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_TIMEOUT = 5.0  # seconds after which the hub counts as unreachable
INDEX = "model_index.json"
CHAIN = "chain.json"  # beside it: the chain that a pipeline was fine-tuned for


@dataclass(frozen=True, repr=False)
class Checkpoint(Shown):
    """A folder that has been checked.

    Args:
        network: where the network is.
        scheduler: where the scheduler is.
        scheduler_class: its class in diffusers.
        family: of its pipeline.
        folder: of the whole pipeline.
        index: the pipeline's parts and options in its model_index.json; nothing else is kept of that file.
        files: all files of the pipeline except the index, in diffusers' layout: "unet/config.json" → where it is.
    """

    network: Path
    scheduler: Path
    scheduler_class: str
    family: PipelineFamily = PIXELS
    folder: Path = Path()
    index: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Source] = field(default_factory=dict)

    def _words(self) -> Iterable[str]:
        return str(self.folder), self.family.network, self.scheduler_class

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """The parts that are there: name → (library, class)."""
        return _parts(self.index)

    def has_weights(self, part: str) -> bool:
        """Whether a part is a model, rather than tables such as those of a tokenizer or a scheduler."""
        return any(name.startswith(f"{part}/") and name.endswith(".safetensors") for name in self.files)

    def laid_out(self) -> AbstractContextManager[Path]:
        """A temporary folder with only the pipeline's files, for diffusers to read."""
        return laid_out({INDEX: json.dumps(self.index).encode()} | self.files)


def find_checkpoint(model: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint called `model`: "digits", a folder, or a hub id.

    Raises:
        InvalidInputError: nothing of that name exists or can be reached, or it is not a diffusers pipeline of a known
            family with safetensors weights. The message says what is there and what to do.
        MissingExtraError: a hub id, and huggingface_hub is not installed.
    """
    if not isinstance(model, str | os.PathLike):
        raise InvalidInputError(f'model must be "digits", a folder or a hub id owner/name, got {shown(model)}')
    if model == "digits":
        return inspect_folder(DIGITS, linked=True)  # some installers link a package's files to their caches
    try:
        place = Path(model).expanduser()
        is_folder, exists = bool(str(model)) and place.is_dir(), place.exists()
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # too long, unreadable, a zero byte, no such home
        raise InvalidInputError(f"model: {str(model)!r} cannot be read ({one_line(error)})") from error
    if is_folder:
        return inspect_folder(place)
    if isinstance(model, str) and HUB_ID.fullmatch(model) and not exists:
        return _from_hub(model)
    raise InvalidInputError(
        f"model: {str(model)!r} is not a folder; give 'digits', a diffusers folder, or a hub id 'owner/name'."
    )


def inspect_folder(folder: Path, *, linked: bool = False) -> Checkpoint:
    """Check a diffusers folder without loading anything.

    Both layouts of diffusers are understood: parts in folders of their own, or (in older hub repositories) network
    and scheduler in the folder itself.

    Args:
        folder: to check.
        linked: whether its files may be links to any place; otherwise they may only lead to places within the folder,
            and from the hub's cache to its blobs.

    Raises:
        InvalidInputError: see `find_checkpoint`.
    """
    family, index = _read_index(folder, linked=linked)
    parts, places = _parts(index), {}
    files: dict[str, Source] = {}
    for part, (library, _) in parts.items():
        own = (folder / part).is_dir() or part not in (family.part, "scheduler")
        places[part] = folder / part if own else folder
        try:
            files |= located(folder, places[part], part, library, linked=linked)
        except InvalidInputError as error:
            raise InvalidInputError(f"model: {error}") from error
    return Checkpoint(places[family.part], places["scheduler"], parts["scheduler"][1], family, folder, index, files)


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    pairs = {name: tuple(where) for name, where in index.items() if isinstance(where, list) and len(where) == 2}
    return {name: where for name, where in pairs.items() if all(isinstance(word, str) for word in where)}


def _read_index(folder: Path, *, linked: bool = False) -> tuple[PipelineFamily, dict[str, Any]]:
    """The family of the pipeline that `model_index.json` describes, and its entries for parts and options."""
    path = folder / INDEX
    try:
        if INDEX not in names_in(folder):
            if (folder / "model").is_dir():
                raise InvalidInputError(f"{folder} is the folder of a run; its model is {folder / 'model'}.")
            raise InvalidInputError(
                f"{folder} is not a diffusers pipeline: it has no {INDEX}; it holds {_listing(folder)}. "
                "Save a whole pipeline there, DDPMPipeline(unet=..., scheduler=...).save_pretrained(folder)."
            )
        inside(folder, path, linked=linked)
    except InvalidInputError as error:
        raise InvalidInputError(f"model: {error}") from error
    try:
        index = read_json(path)
        pipeline, parts = index["_class_name"], _parts(index)
        if not isinstance(pipeline, str):
            raise InvalidInputError(f"its _class_name is {pipeline!r}, not the name of a pipeline")
    except (InvalidInputError, KeyError) as error:
        raise InvalidInputError(f"model: {path} is not a valid model index ({one_line(error)}).") from error
    for name, (library, code) in parts.items():
        if library not in ("diffusers", "transformers") and (name, library) != ("safety_checker", "stable_diffusion"):
            raise InvalidInputError(
                f"model: {folder} brings its own {name} code ({library}.{code}), and code from checkpoints is "
                f"never run; use a {name} from diffusers."
            )
    try:
        family = family_of(pipeline, parts) or probed_family(pipeline, parts)
    except InvalidInputError as error:
        raise InvalidInputError(f"model: {folder}: {error}") from error
    if family is None:
        listed = ", ".join(f"{name}: {where[-1]}" for name, where in parts.items()) or "nothing"
        raise InvalidInputError(
            f"model: {folder} is a {one_line(pipeline)} with {one_line(listed)}, and diffusers has no pipeline of that "
            "name. What can be fine-tuned are the pipelines of diffusers whose rows are affine in their network's "
            "answers, and in Python any network, as a denoiser u(x, t, **condition) of a Chain (docs/howto/extend.md)."
        )
    for name in parts:
        if name not in family.parts:
            raise InvalidInputError(
                f"model: {path} names a part {name!r}, and a {pipeline} has only {', '.join(sorted(family.parts))}."
            )
    if family.latent and not family.probed and parts["vae"] != ("diffusers", "AutoencoderKL"):
        raise InvalidInputError(f"model: {folder} has the decoder {parts['vae'][1]}; only AutoencoderKL is supported.")
    kept = ("_class_name", "_diffusers_version", *family.parts, *family.options)
    return family, {key: value for key, value in index.items() if key in kept}


def _listing(folder: Path) -> str:
    """The entries of the folder, for a message."""
    return listing([name + "/" * (folder / name).is_dir() for name in names_in(folder)])


def _from_hub(hub_id: str) -> Checkpoint:
    """The checkpoint from the local cache if it is complete there, otherwise from the hub."""
    require("huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return inspect_folder(Path(snapshot_download(hub_id, local_files_only=True)))
    except (LocalEntryNotFoundError, InvalidInputError):
        pass  # not in the cache, or not completely

    names = names_on_hub(hub_id, "give the folder, or use 'digits'")
    if INDEX not in names:
        raise InvalidInputError(f"model: {hub_id!r} is not a diffusers pipeline: it holds {listing(names)}.")
    family, index = _read_index(Path(snapshot_download(hub_id, allow_patterns=[INDEX])))
    try:
        wanted = [INDEX, CHAIN, *_wanted(hub_id, family, _parts(index), names)]
    except InvalidInputError as error:
        raise InvalidInputError(f"model: {error}") from error
    return inspect_folder(Path(snapshot_download(hub_id, allow_patterns=wanted)))


def names_on_hub(hub_id: str, then: str) -> set[str]:
    """The files of a repository on the hub.

    Args:
        hub_id: owner/name.
        then: what to do once it has been downloaded elsewhere, for messages.

    Raises:
        InvalidInputError: there is no such repository, or no answer.
    """
    require("huggingface_hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    advice = (
        f"There is no folder {hub_id!r} here, and it is not in the local cache of the hub. Download it where there is "
        f"a network (`hf download {hub_id} --local-dir FOLDER`) and {then}."
    )
    try:
        # This request is not repeated; the downloads below are, with growing pauses.
        siblings = HfApi().model_info(hub_id, timeout=HUB_TIMEOUT).siblings or []
    except RepositoryNotFoundError as error:
        raise InvalidInputError(f"model: the hub has no public model {hub_id!r}. {advice}") from error
    except Exception as error:  # the HTTP libraries have errors of their own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
        raise InvalidInputError(f"model: {hub_id!r} cannot be reached on the hub ({reason}). {advice}") from error
    return {sibling.rfilename for sibling in siblings}


def _wanted(hub_id: str, family: PipelineFamily, parts: dict[str, tuple[str, str]], names: set[str]) -> Iterator[str]:
    """The files of a repository that its pipeline consists of."""
    for part, (library, _) in parts.items():
        own = any(name.startswith(f"{part}/") for name in names) or part not in (family.part, "scheduler")
        prefix = f"{part}/" if own else ""
        there = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        files = needed(part, library, there)
        if files[:1] == ["config.json"] and not weights(library, there):
            raise no_weights(hub_id, there)
        yield from (prefix + name for name in files)
