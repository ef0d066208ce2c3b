"""Arrays of numbers in files: .npy, .npz, .csv, .safetensors and IDX, read without running any code in them.

The size of an array is known before anything is allocated: from the header of a .npy array, the directory of an
archive, or the lines of a table. The content of a pickle is known only by running it, so pickles (.pt, .pkl, …) are
refused.
"""

from __future__ import annotations

import csv
import math
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import numpy as np

from implicit_diffusion.commands.shared.arrays.idx import idx_files, is_idx, read_idx
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.showing import Shown

FORMATS = "FILE.npy, FILE.npz, FILE.csv, FILE.safetensors, or an IDX file such as train-images-idx3-ubyte.gz"
KEYED = (".npz", ".safetensors")  # hold arrays by name: FILE.npz:NAME is one of them
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".bin")
HEADER = 2**16  # bytes, of an array in an archive; numpy reads no header of more than 10000
MOST_LISTED = 10  # names, rows, or columns in a message
EXACT = 2**53  # integers up to here are doubles
COMMA = re.compile(r"[+-]?\d*,\d+")  # a number with a decimal comma


@dataclass(frozen=True, repr=False)
class ArrayFile(Shown):
    """An array of numbers, and the names of its columns where the file has some."""

    array: np.ndarray
    columns: tuple[str, ...] | None = None


def place_of(name: str) -> tuple[str, str | None]:
    """The file that `name` stands for, and which of its arrays: FILE.npz:NAME is the array NAME of FILE.npz."""
    file, colon, key = name.rpartition(":")
    if colon and not os.path.isfile(name) and file.lower().endswith(KEYED):
        return file, key
    return name, None


def read_array_file(name: str, otherwise: str = "") -> ArrayFile:
    """The numbers in a file.

    Args:
        name: of a file, or FILE.npz:NAME; of a folder with IDX files, or of a data set in `idx.PACKAGES`, for its
            training images.
        otherwise: other values of the option, for the message about a missing file.

    Raises:
        InvalidInputError: no such file, a pickle, or one that does not hold one array of real numbers.
        MemoryLimitError: an array that does not fit into the memory that is free.
    """
    file, key = place_of(name)
    files = idx_files(name)
    path = Path(file) if files is None else files.images
    if not os.path.isfile(path):  # a folder, pipe or device is refused: reading it might never end
        raise InvalidInputError(f"--data {name}: no such file; give {otherwise}{FORMATS}")
    suffix = path.suffix.lower()
    if suffix in PICKLES or (suffix not in KEYED and _is_torch_archive(path)):
        raise InvalidInputError(
            f"--data {name} is a pickle, as torch.save writes it: reading one would run the code in it, so none is "
            f"read. In the program that has the array x, write numpy.save({path.stem + '.npy'!r}, x), with "
            f"x.numpy(force=True) for a tensor, and give that file"
        )
    try:
        if is_idx(path):
            array = read_idx(name, path)
            return ArrayFile(array[:, None] if array.ndim == 3 else array)  # grey images
        if suffix == ".csv":
            return _read_csv(name, path)
        if suffix == ".npz":
            return ArrayFile(_read_npz(name, path, key))
        if suffix == ".safetensors":
            return ArrayFile(_read_safetensors(name, path, key))
        return ArrayFile(_read_npy(name, path))
    except (InvalidInputError, MemoryLimitError):
        raise
    except Exception as error:  # libraries raise errors of many types: ValueError, EOFError, SyntaxError, ...
        form = suffix if suffix in (".csv", *KEYED) else ".npy"
        what = {".csv": " table", ".npy": " array"}.get(form, " archive of arrays")
        unknown = "" if suffix in (".npy", ".csv", *KEYED) else f"; {FORMATS} are read"
        form, what, unknown = ("IDX file", f" ({path.name})", "") if is_idx(path) else (form, what, unknown)
        raise InvalidInputError(f"--data {name} is not a sound {form}{what}: {one_line(error)}{unknown}") from error


def _is_torch_archive(path: Path) -> bool:
    """Whether a file is what torch.save writes, whatever its name: a zip archive with a pickle in it."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        return any(member.endswith("data.pkl") for member in archive.namelist())


def _read_npy(name: str, path: Path) -> np.ndarray:
    if is_zipfile(path):
        raise InvalidInputError(
            f"--data {name} must hold one array of numbers, got an archive; name it FILE.npz, or save one of its arrays"
        )
    with path.open("rb") as file:
        shape, dtype, start = _header(file)
        _check(name, shape, dtype, os.fstat(file.fileno()).st_size - start)
    return np.asarray(np.load(path, allow_pickle=False))


def _read_npz(name: str, path: Path, key: str | None) -> np.ndarray:
    """An array of an archive; its size in the directory, which is checked first, is the most that zipfile unpacks."""
    with ZipFile(path) as archive:
        members = [member for member in archive.namelist() if member.endswith(".npy")]
        member = _chosen(name, [m.removesuffix(".npy") for m in members], key) + ".npy"
        with archive.open(member) as file:
            shape, dtype, start = _header(BytesIO(file.read(HEADER)))
        _check(name, shape, dtype, archive.getinfo(member).file_size - start)
        with archive.open(member) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _read_safetensors(name: str, path: Path, key: str | None) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        chosen = _chosen(name, list(file.keys()), key)
        promised = file.get_slice(chosen)
        # types are called F32, I64, BOOL and so on: the number is that of bits
        bits = int("".join(c for c in promised.get_dtype().split("_")[0] if c.isdigit()) or 8)
        _check_memory(name, math.prod(promised.get_shape()), bits // 8 or 1, single=bits <= 16)
        x = file.get_tensor(chosen)
        if x.is_complex():
            raise InvalidInputError(f"--data {name} must hold one array of numbers, got {x.dtype}")
        if x.is_floating_point() and x.element_size() < 4:  # numpy has no bfloat16
            x = x.float()
        return np.asarray(x.numpy())


def _chosen(name: str, names: list[str], key: str | None) -> str:
    """The name of the array that `key` asks for, or of the only one."""
    listed = ", ".join(names[:MOST_LISTED]) + (", …" if len(names) > MOST_LISTED else "")
    if not names:
        raise InvalidInputError(f"--data {name} holds no arrays")
    if key is None and len(names) > 1:
        raise InvalidInputError(
            f"--data {name} must hold one array of numbers, got {len(names)} ({listed}); name one, as in "
            f"{name}:{names[0]}"
        )
    if key is not None and key not in names:
        raise InvalidInputError(f"--data {name} holds no array {key}, but {listed}")
    return names[0] if key is None else key


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type in the header of a .npy array, and where its numbers begin."""
    version = np.lib.format.read_magic(file)
    # a header of version 3.0 differs from 2.0 in the names of fields alone, which no array of numbers has
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(
            "it holds Python objects, and loading them would run code (allow_pickle is off); save numbers instead, as "
            "numpy.asarray(x, dtype=float) makes them"
        )
    return shape, dtype, file.tell()


def _check(name: str, shape: tuple[int, ...], dtype: np.dtype, behind: int) -> None:
    """Refuse an array that does not hold numbers, does not have the size in its header, or is too large for memory."""
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise InvalidInputError(f"--data {name} must hold one array of numbers, got {dtype}")
    promised = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised != behind:
        raise ValueError(f"its header says {promised} bytes of shape {shape}, and {behind} follow")
    _check_memory(name, math.prod(shape), dtype.itemsize, single=np.can_cast(dtype, np.float32))


def _check_memory(name: str, numbers: int, size: int, *, single: bool) -> None:
    import psutil

    kept = 4 if single else 8
    needed = numbers * (size + 2 * kept + 8 + 4)  # as read, as kept and split, for moments, standardised
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"--data {name}: {numbers} numbers need {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; use fewer rows"
        )


def _read_csv(name: str, path: Path) -> ArrayFile:
    """A table of numbers. Its first line names the columns if no cell of it is a number.

    Cells are separated by tabs, semicolons or commas: the first of these that the first line contains.
    """
    with path.open("rb") as binary:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: binary.read(2**20), b"")) + 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = next((mark for mark in "\t;" if mark in first), ",")
        rows = _rows(csv.reader(file, delimiter=delimiter, strict=True))
        number, head = next(rows, (1, []))
        _check_memory(name, lines * len(head), 8, single=False)
        columns = None
        if head and all(_value(cell) is None for cell in head) and any(cell.strip() for cell in head):
            columns = tuple(cell.strip() for cell in (head[0].strip().removeprefix("#"), *head[1:]))
        else:
            rows = chain([(number, head)], rows)
        values, bad, count = array("d"), dict[int, list[Any]](), 0
        for number, row in rows:
            if len(row) != len(head):
                raise InvalidInputError(
                    f"--data {name}: line {number} has {len(row)} cells, the first one {len(head)}; give every line "
                    "as many"
                )
            count += 1
            for column, cell in enumerate(row):
                value = _value(cell)
                if value is None:
                    bad.setdefault(column, [number, cell.strip(), 0])[2] += 1
                values.append(math.nan if value is None else value)
    if bad:
        raise InvalidInputError(f"--data {name}: {_listed(bad, columns, count)}")
    table = np.frombuffer(values, dtype=np.float64).reshape(count, len(head))
    if columns and not columns[0] and (table[:, 0] - table[0, 0] == np.arange(count)).all():
        raise InvalidInputError(
            f"--data {name}: column 1 has no name and counts the rows; write the table without it (with pandas, "
            "to_csv(FILE, index=False))"
        )
    return ArrayFile(table, columns and tuple(column or f"column {i}" for i, column in enumerate(columns, start=1)))


def _rows(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows with the numbers of their lines, without blank lines."""
    for row in reader:
        if row and (len(row) > 1 or row[0].strip()):
            yield reader.line_num, row


def _value(cell: str) -> float | None:
    """The number in a cell; None for anything else, and for an integer that a double would round."""
    try:
        value = float(cell)
    except ValueError:
        return None
    digits = cell.strip().lstrip("+-")
    if "_" in cell or (abs(value) >= EXACT and digits.isdigit() and (len(digits) > 400 or int(digits) != abs(value))):
        return None
    return value


def _listed(bad: dict[int, list[Any]], columns: tuple[str, ...] | None, count: int) -> str:
    """Cells without numbers, by column: how many, and the first one."""
    parts = []
    for column, (line, cell, times) in sorted(bad.items())[:MOST_LISTED]:
        called = f" ({columns[column]})" if columns and columns[column] else ""
        what = repr(one_line(cell)) if cell else "empty"
        parts.append(f"column {column + 1}{called} holds no number in {times} of {count} rows, in line {line} {what}")
    more = f"; and {len(bad) - MOST_LISTED} more columns" if len(bad) > MOST_LISTED else ""
    change = "Leave such a column out, remove or impute such rows, or write them as numbers"
    if all(COMMA.fullmatch(cell) for _, cell, _ in bad.values()):
        change = "These look like decimal commas: write points"
    return f"{'; '.join(parts)}{more}. {change}"
