"""Which files a pipeline consists of, where each of them really is, and a folder that holds these alone.

    names in a part's folder  →  the files of it that are needed (`needed`)  →  where they are (`located`)
    {"unet/config.json": where it is, …}  →  `laid_out`: a temporary folder of links to them, for diffusers to read
                                          →  `copied`: regular files beside a trained network

A model folder may come from anywhere, so nothing else of it is read or copied: every file must lie inside the folder,
links followed, or be one of the hub cache's own, whose snapshots are links into its blobs. Weights that were saved as a
variant (`model.fp16.safetensors`), in parts (`model.safetensors.index.json`) or both are laid out under plain names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.reading import one_line, read_json, refuse_unless_regular

Source = Path | bytes  # where a file is, or what is in it

VARIANTS = ("", "fp16", "bf16")  # of weights, in the order of choice; others, non_ema say, are never loaded
TABLES = (".json", ".txt", ".model")  # files of tokenizers and image processors
VOCABULARIES: tuple[set[str], ...] = (
    {"tokenizer.json"},
    {"vocab.json", "merges.txt"},
    {"spiece.model"},
    {"tokenizer.model"},
    {"vocab.txt"},
)  # without one of these, transformers makes an empty one
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SHARD = re.compile(r"-\d{5}-of-\d{5}")


def needed(part: str, library: str, names: Collection[str]) -> list[str]:
    """Of the files `names` in a part's folder, those that a pipeline consists of; promised ones whether there or not.

    Args:
        part: its name in model_index.json.
        library: that its class is from.
        names: in the folder, on a disk or on the hub.
    """
    if part == "scheduler":
        return ["scheduler_config.json"]
    if part.startswith("tokenizer") or part == "feature_extractor":
        return sorted(name for name in names if name.endswith(TABLES))
    return ["config.json", *weights(library, names)]


def weights(library: str, names: Collection[str]) -> list[str]:
    """Of the files `names`, those that hold a model's weights: one, or an index and its shards; none where none are."""
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    for variant in VARIANTS:
        end = variant and f".{variant}"
        if f"{stem}{end}.safetensors" in names:
            return [f"{stem}{end}.safetensors"]
        if (index := f"{stem}.safetensors.index{end}.json") in names:
            shards = (name for name in names if name.startswith(stem) and name.endswith(".safetensors"))
            words = {f"{stem}{end}.safetensors", f"{stem}.safetensors{end}"}  # the variant stood last once
            return [index, *sorted(shard for shard in shards if SHARD.sub("", shard) in words)]
    return []


def located(folder: Path, place: Path, part: str, library: str, *, linked: bool = False) -> dict[str, Source]:
    """The files of one part under the names that they are laid out with, `part`/….

    Args:
        folder: of the whole model.
        place: of the part: in a folder of its own, or in `folder` itself.
        part: its name.
        library: that its class is from.
        linked: whether files may be links to anywhere.

    Raises:
        InvalidInputError: a file is missing, lies outside, or is no regular file; there are no weights.
    """
    names = names_in(place)
    files = needed(part, library, names)
    for name in files:
        if name not in names:
            raise _lacking(folder, place / name)
    if not files:
        raise _lacking(folder, place)
    if part.startswith("tokenizer") and not any(one <= {*files} for one in VOCABULARIES):
        either = ", or ".join(" and ".join(sorted(one)) for one in VOCABULARIES)
        raise InvalidInputError(f"{place} has no vocabulary ({either}); it holds {listing(names)}")
    found = {name: real(folder, place / name, linked=linked) for name in files}
    if files[0] != "config.json":
        return {f"{part}/{name}": path for name, path in found.items()}
    if len(found) == 1:
        raise no_weights(str(place if place != folder else folder), names)
    return {f"{part}/{name}": source for name, source in _plainly(found, files[1]).items()}


def _plainly(found: dict[str, Path], first: str) -> dict[str, Source]:
    """A model's files, with weights named as those of no variant."""
    stem = first.partition(".")[0]
    if first.endswith(".safetensors"):
        return {"config.json": found["config.json"], f"{stem}.safetensors": found[first]}
    index = read_json(found[first])
    owners, totals = index.get("weight_map"), index.get("metadata")
    if not isinstance(owners, dict) or not owners or not all(isinstance(shard, str) for shard in owners.values()):
        raise InvalidInputError(f"{found[first]} has no weight_map from tensors to files")
    shards = sorted(set(owners.values()))
    for shard in shards:
        if shard not in found or not shard.endswith(".safetensors"):
            raise InvalidInputError(f"{found[first]} names the file {shard!r}, which is no part of these weights")
    plain = {shard: f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards)}
    written = {
        "metadata": totals if isinstance(totals, dict) else {},
        "weight_map": {tensor: plain[shard] for tensor, shard in owners.items()},
    }
    files: dict[str, Source] = {"config.json": found["config.json"]}
    files |= {plain[shard]: found[shard] for shard in shards}
    return files | {f"{stem}.safetensors.index.json": json.dumps(written, indent=2).encode()}


def names_in(folder: Path) -> list[str]:
    """The names in a folder; none where it is no folder.

    Raises:
        InvalidInputError: it may not be looked into.
    """
    try:
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise InvalidInputError(f"{folder} cannot be read ({one_line(error)})") from error


def real(folder: Path, path: Path, *, linked: bool = False) -> Path:
    """Where a file of a model's folder really is.

    Raises:
        InvalidInputError: outside of the folder (unless `linked`), nowhere, or it is no regular file.
    """
    try:
        home, found = folder.resolve(strict=True), path.resolve(strict=True)
        refuse_unless_regular(path, found.stat().st_mode)
    except InvalidInputError:
        raise
    except (OSError, RuntimeError) as error:  # a RuntimeError for links in a circle
        raise InvalidInputError(f"{path} cannot be read ({one_line(error)})") from error
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not linked and not any(found.is_relative_to(inside) for inside in homes):
        raise InvalidInputError(
            f"{path} is a link to {found}, outside of the model's folder, and files from elsewhere are not read; "
            "if it belongs to the model, copy it there"
        )
    return found


def no_weights(where: str, names: Collection[str]) -> InvalidInputError:
    """The error for a part without weights that can be read without executing them."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        return InvalidInputError(
            f"{where} holds only pickled weights ({', '.join(pickles)}), and loading a pickle can run any code. "
            "If you trust the file, convert it once: DiffusionPipeline.from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(new_folder)"
        )
    if any(name.endswith(".safetensors") for name in names):
        loaded = " or ".join(f"*{variant and '.'}{variant}.safetensors" for variant in VARIANTS)
        return InvalidInputError(f"{where} holds no weights that are loaded ({loaded}); it holds {listing(names)}")
    return InvalidInputError(f"{where} holds no *.safetensors weights; it holds {listing(names)}")


def listing(names: Collection[str], limit: int = 12) -> str:
    """Names for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) or "nothing") + more


def _lacking(folder: Path, path: Path) -> InvalidInputError:
    held = [name + "/" * (folder / name).is_dir() for name in names_in(folder)]
    return InvalidInputError(
        f"{folder} lacks {path.relative_to(folder)}, which its model_index.json promises; it holds {listing(held)}"
    )


@contextmanager
def laid_out(files: Mapping[str, Source]) -> Iterator[Path]:
    """A temporary folder with these files and no others, as links."""
    with tempfile.TemporaryDirectory(prefix="implicit-diffusion-") as place:
        for name, source in files.items():
            path = Path(place, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                path.write_bytes(source)
                continue
            try:
                path.symlink_to(source)
            except OSError:  # a system without links, or without the right to make them
                shutil.copyfile(source, path)
        yield Path(place)


def copied(files: Mapping[str, Source], folder: Path) -> None:
    """Write these files into `folder`: the user's own, whatever the rights on the originals, each in one step.

    Raises:
        InvalidInputError: an original has gone, or cannot be read any more.
    """
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        else:
            try:
                original = source.open("rb")
            except OSError as error:
                raise InvalidInputError(f"model: {source} cannot be copied ({one_line(error)})") from error
            with original, temporary.open("wb") as copy:
                shutil.copyfileobj(original, copy, 2**20)
        temporary.replace(path)
