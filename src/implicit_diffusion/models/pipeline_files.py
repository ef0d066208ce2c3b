"""The files that a pipeline consists of, where each of them is, and a folder that holds only these.

    names in a part's folder  →  those that are needed (`needed`)  →  where these files are (`located`)
    {"unet/config.json": where it is, …}  →  `laid_out`: a temporary folder of links to them, for diffusers to read
                                          →  `copy_files`: regular files beside a trained network

A model folder may come from anywhere, so nothing else in it is read or copied: every file must lie inside the folder
after links are followed, or be in the hub's cache, whose snapshots are links to its blobs. Weights that were saved as a
variant (`model.fp16.safetensors`), in parts (`model.safetensors.index.json`) or both get the names of the default
variant.
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
from implicit_diffusion.files.foreign import inside
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.models.code_refusals import without_places

Source = Path | bytes  # where a file is, or its contents

VARIANTS = ("", "fp16", "bf16")  # of weights, the first that is there; others, such as non_ema, are never loaded
TOKENIZER = "tokenizer_config.json"
TABLES = (".json", ".txt", ".model", ".jinja")  # files of tokenizers and processors; templates run in a sandbox
VOCABULARIES: tuple[set[str], ...] = (
    {"tokenizer.json"},
    {"vocab.json", "merges.txt"},
    {"spiece.model"},
    {"tokenizer.model"},
    {"vocab.txt"},
)  # without one of these, transformers makes an empty vocabulary
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SHARD = re.compile(r"-\d{5}-of-\d{5}")


def needed(part: str, library: str, names: Collection[str]) -> list[str]:
    """Names of the files in a part's folder that the pipeline needs, including required ones that are missing.

    Args:
        part: its name in model_index.json.
        library: that its class is from.
        names: of all files in the folder, on a disk or on the hub.
    """
    if part == "scheduler":
        return ["scheduler_config.json"]
    if _consists_of_tables(part):
        return sorted(name for name in names if name.endswith(TABLES))
    return ["config.json", *weights(library, names)]


def _consists_of_tables(part: str) -> bool:
    return part.startswith("tokenizer") or part == "feature_extractor" or part.endswith("processor")


def weights(library: str, names: Collection[str]) -> list[str]:
    """The files among `names` with a model's weights: one, or an index and its shards; empty if there are none."""
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    for variant in VARIANTS:
        end = variant and f".{variant}"
        if f"{stem}{end}.safetensors" in names:
            return [f"{stem}{end}.safetensors"]
        if (index := f"{stem}.safetensors.index{end}.json") in names:
            shards = (name for name in names if name.startswith(stem) and name.endswith(".safetensors"))
            words = {f"{stem}{end}.safetensors", f"{stem}.safetensors{end}"}  # older releases put the variant last
            return [index, *sorted(shard for shard in shards if SHARD.sub("", shard) in words)]
    return []


def located(folder: Path, place: Path, part: str, library: str, *, linked: bool = False) -> dict[str, Source]:
    """The files of one part, under the names that they get in `laid_out`, `part`/….

    Args:
        folder: of the whole model.
        place: of the part: in a folder of its own, or in `folder` itself.
        part: its name.
        library: that its class is from.
        linked: whether files may be links to any place.

    Raises:
        InvalidInputError: a file is missing, lies outside of the folder, or is not a regular file; there are no
            weights.
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
    paths = {name: inside(folder, place / name, linked=linked) for name in files}
    if files[0] != "config.json" or _consists_of_tables(part):
        sources: dict[str, Source] = dict(paths)
        if TOKENIZER in paths:
            sources[TOKENIZER] = without_places(paths[TOKENIZER])
        return {f"{part}/{name}": source for name, source in sources.items()}
    if len(paths) == 1:
        raise no_weights(str(place if place != folder else folder), names)
    return {f"{part}/{name}": source for name, source in _default_variant(paths, files[1]).items()}


def _default_variant(paths: dict[str, Path], first: str) -> dict[str, Source]:
    """A model's files, with its weights under the names of the default variant."""
    stem = first.partition(".")[0]
    if first.endswith(".safetensors"):
        return {"config.json": paths["config.json"], f"{stem}.safetensors": paths[first]}
    index = read_json(paths[first])
    owners, totals = index.get("weight_map"), index.get("metadata")
    if not isinstance(owners, dict) or not owners or not all(isinstance(shard, str) for shard in owners.values()):
        raise InvalidInputError(f"{paths[first]} has no weight_map from tensors to files")
    shards = sorted(set(owners.values()))
    for shard in shards:
        if shard not in paths or not shard.endswith(".safetensors"):
            raise InvalidInputError(f"{paths[first]} names the file {shard!r}, which is not one of these weights")
    renamed = {shard: f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards)}
    contents = {
        "metadata": totals if isinstance(totals, dict) else {},
        "weight_map": {tensor: renamed[shard] for tensor, shard in owners.items()},
    }
    files: dict[str, Source] = {"config.json": paths["config.json"]}
    files |= {renamed[shard]: paths[shard] for shard in shards}
    return files | {f"{stem}.safetensors.index.json": json.dumps(contents, indent=2).encode()}


def names_in(folder: Path) -> list[str]:
    """The names in a folder; empty if it does not exist.

    Raises:
        InvalidInputError: it cannot be read.
    """
    try:
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise InvalidInputError(f"{folder} cannot be read ({one_line(error)})") from error


def no_weights(where: str, names: Collection[str]) -> InvalidInputError:
    """The error for a part whose weights are missing, or pickled."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        return InvalidInputError(
            f"{where} holds only pickled weights ({', '.join(pickles)}), and loading a pickle can run any code. "
            "If you trust the file, convert it once: DiffusionPipeline.from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(new_folder)"
        )
    if any(name.endswith(".safetensors") for name in names):
        loaded = " or ".join(f"*{variant and '.'}{variant}.safetensors" for variant in VARIANTS)
        return InvalidInputError(
            f"{where} holds none of the weights that are loaded ({loaded}); it holds {listing(names)}"
        )
    return InvalidInputError(f"{where} holds no *.safetensors weights; it holds {listing(names)}")


def listing(names: Collection[str], limit: int = 12) -> str:
    """The first `limit` names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) or "nothing") + more


def _lacking(folder: Path, path: Path) -> InvalidInputError:
    held = [name + "/" * (folder / name).is_dir() for name in names_in(folder)]
    return InvalidInputError(
        f"{folder} lacks {path.relative_to(folder)}, which its model_index.json names; it holds {listing(held)}"
    )


@contextmanager
def laid_out(files: Mapping[str, Source]) -> Iterator[Path]:
    """A temporary folder of links to these files, and of nothing else."""
    with tempfile.TemporaryDirectory(prefix="implicit-diffusion-") as place:
        for name, source in files.items():
            path = Path(place, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                path.write_bytes(source)
                continue
            try:
                path.symlink_to(source)
            except OSError:  # a system without links, or without permission to make them
                shutil.copyfile(source, path)
        yield Path(place)


def copy_files(files: Mapping[str, Source], folder: Path) -> None:
    """Copy these files into `folder`, each in one step, with the user's default permissions.

    Raises:
        InvalidInputError: an original no longer exists, or cannot be read.
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
