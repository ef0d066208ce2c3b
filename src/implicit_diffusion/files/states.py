"""States on disk: a safetensors file whose header holds the tree and whose body holds the tensors, and a manifest.

A state is what `state_dict()` returns: dicts (keys str or int), lists and tuples of tensors, numbers, strings,
booleans and None. In the header's JSON a tree reads

    tensor  {"tensor": its place}        dict   {"dict": [[key, tree], ...]}     keys keep their type
    list    {"list": [tree, ...]}        tuple  {"tuple": [tree, ...]}
    float   1.5 or {"float": "nan"}      str, int, bool and None as themselves

so nothing in it can be executed.

    state.safetensors       the state
    state.safetensors.tmp   a new one, while it is written and read back
    manifest.json           what the state is, to the last bit (`files.manifest`)

The manifest of the new state replaces the previous one in one step; the state gets its name after that. However the
process ends, one of the two files is what the manifest says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, NonFiniteError, StorageError, check_path
from implicit_diffusion.files.atomic import UNFINISHED, make_folder, sync, sync_folder, writing
from implicit_diffusion.files.manifest import MANIFEST, Manifest, read_manifest
from implicit_diffusion.processes import main_only

STATE_FILE = "state.safetensors"
HEADER = "implicit-diffusion state"


@main_only
def save_state(folder: str | PathLike[str], state: Any, about: Mapping[str, Any] | None = None) -> None:
    """Write `state` into a folder, in place of the previous one, and read it back.

    Tensors are stored bit for bit, each in full: views come back contiguous, shared storage comes back separate.
    Where several processes compute a run together, all of them call this, and the main one writes.

    Args:
        folder: made if it does not exist.
        state: a tree as described above.
        about: plain values by names that say what the state is of; `load_state` can compare them.

    Raises:
        InvalidInputError: the tree holds something else; the message says where.
        StorageError: it cannot be written, or what is read back is not what was written.

    After each of these errors, the previous state is unchanged.
    """
    folder = check_path("folder", folder)
    tensors, tree = _taken_apart(state)
    make_folder(folder)
    _write(folder, tensors, tree, about or {})


def save_state_there(folder: Path, state: Any, about: Mapping[str, Any]) -> None:
    """`save_state`, except that the folder is not made; where it is missing, that is an error."""
    _write(folder, *_taken_apart(state), about)


def move_state(source: Path, target: Path) -> None:
    """Let the state of one folder replace that of another, in one step; errors as in `save_state`."""
    new = target / (STATE_FILE + UNFINISHED)
    moves = (source / STATE_FILE, new), (source / MANIFEST, target / MANIFEST), (new, target / STATE_FILE)
    try:
        with writing(target):
            for old, moved in moves:
                old.replace(moved)
                sync_folder(target)
    except BaseException:
        _settle(target)
        raise


def _taken_apart(state: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors of a state, and its tree as text."""
    tensors: dict[str, Tensor] = {}
    try:
        tree = json.dumps(_encode(state, tensors, "state"), ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise InvalidInputError("state is nested too deeply to be written") from error
    return tensors, tree


def _write(folder: Path, tensors: dict[str, Tensor], tree: str, about: Mapping[str, Any]) -> None:
    """Write them, read them back, and let them replace the previous state."""
    _settle(folder)
    new = folder / (STATE_FILE + UNFINISHED)
    try:
        with writing(new.with_suffix("")):
            save_file(tensors, new, metadata={HEADER: tree})
            sync(new)
            manifest = Manifest.of(new, tensors, about)
        _read_back(new, lambda: manifest.check(new) == {HEADER: tree})
        manifest.write(folder)
        _read_back(folder / MANIFEST, lambda: read_manifest(folder) == manifest)
        with writing(new.with_suffix("")):
            new.replace(new.with_suffix(""))
            sync_folder(folder)
    except BaseException:
        _settle(folder)  # half a state would keep the disk full
        raise


def load_state(folder: str | PathLike[str], about: Mapping[str, Any] | None = None) -> Any:
    """Read what `save_state` wrote; tensors on the CPU, each with memory of its own.

    Args:
        folder: that was given to `save_state`.
        about: what the state must be of; what either side does not say is not compared.

    Raises:
        InvalidInputError: there is no state; or it is damaged, not a state, or of something else.
        OtherSchemaError: another version wrote it, in another form.
    """
    folder = check_path("folder", folder)
    if not has_state(folder) and not (folder / STATE_FILE).exists():
        raise InvalidInputError(f"no state to continue from in {folder}; give a folder that save_state wrote")
    manifest = read_manifest(folder)
    for name, value in (about or {}).items():
        written = manifest.about.get(name)
        if value is not None and written not in (None, value):
            raise InvalidInputError(f"{folder} is a state of something else: its {name} is {written}, not {value}")
    path = folder / STATE_FILE
    try:
        tensors, header = manifest.load(path)
    except InvalidInputError:
        if not manifest.fits(folder / (STATE_FILE + UNFINISHED)):
            raise
        tensors, header = manifest.load(folder / (STATE_FILE + UNFINISHED))
    if HEADER not in header:
        raise InvalidInputError(f"{path} is a safetensors file, but not a state; give a folder that save_state wrote")
    try:
        return _decode(json.loads(header[HEADER]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidInputError(f"{path} is damaged, or not a state: {error}") from error


def has_state(folder: Path) -> bool:
    """Whether the folder holds a state that was written to its end."""
    return (folder / MANIFEST).exists()


def _settle(folder: Path) -> None:
    """End what another process, or an error, has left: a new state gets its name if the manifest is its own."""
    new = folder / (STATE_FILE + UNFINISHED)
    with suppress(OSError):
        (folder / (MANIFEST + UNFINISHED)).unlink(missing_ok=True)
        if not new.exists():
            return
        with suppress(InvalidInputError):
            manifest = read_manifest(folder)
            if not manifest.fits(folder / STATE_FILE) and manifest.fits(new):
                new.replace(folder / STATE_FILE)
        new.unlink(missing_ok=True)


def _read_back(path: Path, is_right: Callable[[], bool]) -> None:
    """Raise `StorageError` unless a file holds what was written to it."""
    try:
        reason = None if is_right() else "it differs from what was written"
    except InvalidInputError as error:
        reason = str(error)
    if reason is not None:
        raise StorageError(
            f"{path} cannot be read back ({reason}); check the disk, and that the folder exists and is writable"
        )


def check_finite(state: Any, may_be_infinite: Collection[str] = ()) -> None:
    """Check every tensor and every number of a state.

    Args:
        state: as for `save_state`.
        may_be_infinite: keys whose tensors may hold infinity, such as a mask, or the logarithm of a weight of zero.

    Raises:
        NonFiniteError: a tensor or number is NaN, or a tensor holds infinity; the message says where.
    """
    for where, key, value in _leaves(state, "state", ""):
        if isinstance(value, float) and math.isnan(value):
            raise NonFiniteError(f"{where} is NaN")
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            allowed = ~value.isnan() if key in may_be_infinite else value.isfinite()
            if not allowed.all():
                raise NonFiniteError(f"{where} holds NaN or infinity")


def _leaves(value: Any, where: str, key: str) -> Iterator[tuple[str, str, Any]]:
    """Every leaf, with its path and the last key on it that is a string."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{where}[{name!r}]", name if isinstance(name, str) else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{where}[{index}]", key)
    else:
        yield where, key, value


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """The tree of `value`; its tensors are added to `tensors` on the way."""
    if isinstance(value, Tensor):
        tensors[where] = _storable(value, where)
        return {"tensor": where}
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise InvalidInputError(f"{where} has the key {key!r}; keys of a state are str or int")
        return {"dict": [[key, _encode(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, float):  # before the others: JSON has no NaN and no infinity
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if value is None or type(value) in (str, int, bool):
        return value
    raise InvalidInputError(
        f"{where} is a {type(value).__name__}; a state holds tensors, numbers, strings, booleans, None, "
        "and dicts, lists and tuples of them"
    )


def _storable(tensor: Tensor, where: str) -> Tensor:
    """A dense, contiguous copy on the CPU, with its own storage."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype == torch.complex128:
        raise InvalidInputError(
            f"{where} is a tensor of layout {tensor.layout} and dtype {tensor.dtype}, which cannot be stored; use a "
            "dense tensor of another dtype"
        )
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).resolve_conj().resolve_neg()


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("a bare list in the header")
        return tree
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _decode(item, tensors) for key, item in content}
        case "list":
            return [_decode(item, tensors) for item in content]
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "float":
            return float(content)
    raise ValueError(f"unknown entry {kind!r} in the header")
