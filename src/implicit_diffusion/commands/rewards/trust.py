"""Whether the code of a reward, or of a model of the user's own, may run without asking the user.

A reward is code, and so is a function that makes a model. A user who names it on the command line, or in Python, wants
it to run. A run directory names one as well, in its config.json, and may come from anywhere: that one runs only if this
user has named the same code before, by place and sha256, and if it does not lie in the run directory. What was named is
recorded below

    $XDG_STATE_HOME/implicit-diffusion/rewards/<sha256 of the place>/<sha256 of the code>

with ~/.local/state for $XDG_STATE_HOME by default. A place includes the python that runs the code, where that is not
this process: a run directory names it as well. With IMPLICIT_DIFFUSION_CACHE=off, or where nothing can be written, it
is remembered by the process alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

from implicit_diffusion.errors import InvalidInputError

SHORT = 60  # letters of arguments in a title
CLIP = "clip:"  # before the folder or hub id of an image–text model, which is data
CALL = r"\((?:\s*|\s*(?:\w+\s*=|[\"']).*)\)"  # of such a model, whose folder may end with parentheses
_named: set[tuple[str, str]] = set()  # place and sha256, in this process
_allowed: set[tuple[str, str]] = set()  # place and sha256 of what a directory names and the user allows in any case
_elsewhere: dict[str, tuple[Path, ...]] = {}  # by place: what code that runs in a process of its own has imported


@dataclass(frozen=True)
class Code:
    """The code that runs when a reward is loaded, read before any of it runs.

    Args:
        name: the reward's, as it was given.
        place: where it is, with its function, the arguments of that function, and the python that runs it.
        files: with links resolved; for a module also those of its packages; none where it is built in.
        content: the bytes of the last file.
        digest: the sha256 of all files.
        python: that runs it in a process of its own; None for this process.
    """

    name: str
    place: str
    files: tuple[Path, ...]
    content: bytes
    digest: str
    python: Path | None = None


class Spelling(NamedTuple):
    """PLACE:function, or PLACE:function(arguments); a name without a place is that of a shipped reward.

    Args:
        place: FILE.py or a module; empty for a shipped reward.
        function: or class, or instance; for an image–text model "clip:MODEL".
        call: the arguments with their parentheses, as they were given; empty where there are none.
    """

    place: str
    function: str
    call: str


def spelled(name: str) -> Spelling:
    """The parts of a reward's name; nothing of it is evaluated."""
    if match := re.fullmatch(rf"({CLIP}.+?)\s*({CALL})?\s*", name, re.DOTALL):
        return Spelling("", match[1], match[2] or "")
    for place in (r"(.+?\.py):", r"([\w.]+):", r"()"):  # a file, whatever its folders are called; a module; shipped
        if match := re.fullmatch(place + r"([^\W\d][\w-]*)\s*(\(.*\))?\s*", name, re.DOTALL):
            return Spelling(match[1], match[2], match[3] or "")
    before, _, function = name.rpartition(":")
    return Spelling(before, function, "")


def is_own(name: str) -> bool:
    """Whether a reward's name stands for code of the user's own, not for a shipped one."""
    return bool(spelled(name).place)


def image_text_model(name: str) -> str | None:
    """The folder or hub id of the image–text model in a reward's name; None where there is none."""
    function = spelled(name).function
    return function.removeprefix(CLIP) if function.startswith(CLIP) else None


def name_of_all(name: str) -> str | None:
    """The name of a reward that decides by itself what is computed; None where files of the user's do."""
    return None if is_own(name) or image_text_model(name) else name


def absolute(name: str) -> str:
    """FILE.py:function and clip:FOLDER with absolute paths; other names as they are."""
    place, function, call = spelled(name)
    if (model := image_text_model(name)) and Path(model).expanduser().is_dir():
        return f"{CLIP}{Path(model).expanduser().absolute()}{call}"
    return f"{Path(place).absolute()}:{function}{call}" if place.endswith(".py") else name


def short(name: str) -> str:
    """A name for people, without the folder of its file; long arguments are cut."""
    place, function, call = spelled(name)
    call = call if len(call) <= SHORT else f"{call[: SHORT - 2]}…)"
    if model := image_text_model(name):
        return f"{CLIP}{Path(model).name if Path(model).is_absolute() else model}{call}"
    return f"{Path(place).name}:{function}{call}" if place else name


def code_of(name: str, python: Path | None = None) -> Code:
    """Find and read the code of "FILE.py:function" or "module:function", without running any of it.

    Its place includes the arguments: a user who has named `loader("mine")` has not named `loader("yours")`.

    Args:
        name: of the reward.
        python: that runs it in a process of its own; None for this process.

    Raises:
        InvalidInputError: there is no such file or module; a module of another python, which is not searched here.
        OSError: it cannot be read.
    """
    place, function, call = spelled(name)
    if python is not None and not place.endswith(".py"):
        raise InvalidInputError(
            f"`reward` {name}: `reward_python` runs a file, FILE.py:function; write one that imports {place}"
        )
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise InvalidInputError(f"`reward`: there is no file {place}")
        files: tuple[Path, ...] = (Path(place).resolve(),)
        where = str(files[0])
    else:
        files = _sources(place)
        where = " ".join(["module", place, *map(str, files)])
    contents = [file.read_bytes() for file in files]
    digest = hashlib.sha256(b"".join(contents)).hexdigest()
    by = "" if python is None else f" by {python}"
    return Code(name, f"{where}:{function}{call}{by}", files, contents[-1] if contents else b"", digest, python)


def remember(code: Code) -> None:
    """Record that this user has named this code."""
    _named.add((code.place, code.digest))
    folder = _folder()
    if folder is not None:
        with suppress(OSError):  # a home that cannot be written to
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _hash(code.place)).mkdir(mode=0o700, exist_ok=True)
            (folder / _hash(code.place) / code.digest).touch(mode=0o600)


def allow(code: Code) -> None:
    """Record that this user allows code that a directory names, also where it lies inside, for as long as this process
    runs.
    """
    remember(code)
    _allowed.add((code.place, code.digest))


def has_imported(code: Code, files: Iterable[Path]) -> None:
    """Note what code that runs in a process of its own has imported."""
    _elsewhere[code.place] = tuple(files)


def check_trust(
    name: str, directory: Path, python: Path | None = None, *, what: str = "reward", advice: str | None = None
) -> None:
    """Refuse code that a run directory names, unless the user has named it before; nothing of it has run then.

    Args:
        name: of one of its rewards, without the weight, or of the function that makes its model.
        directory: of the run.
        python: that the directory names to run it.
        what: "reward" or "model".
        advice: how the user allows it, in place of `trust_reward` or `trust_model`.

    Raises:
        InvalidInputError: code inside the directory, or its python; code that has changed or was never named, or no
            such code.
    """
    if not is_own(name):
        return
    try:
        code = code_of(name, python)
    except OSError as error:
        raise InvalidInputError(f"`{what}` {name} cannot be read: {error}") from error
    except InvalidInputError as error:
        raise InvalidInputError(str(error).replace("`reward`", f"`{what}`")) from error
    places = [*code.files, *([] if python is None else [python.absolute(), python.resolve()])]
    inside = [file for file in places if file.is_relative_to(directory.resolve())]
    known = _known(code.place)
    if (code.place, code.digest) in _allowed:
        return
    if inside:
        why = f"{inside[0]} lies inside the run directory"
    elif code.digest in known:
        return
    elif known:
        why = f"it has changed since you named it (its sha256 is {code.digest[:12]}… now)"
    else:
        kept = "" if _folder() else " (with IMPLICIT_DIFFUSION_CACHE=off, nothing is recorded)"
        why = f"you have not named it on this machine before{kept}"
    by = "" if python is None else f", run by {python},"
    raise InvalidInputError(
        f"{directory} names the {what} {name}{by}, which is code, and {why}. Read it; if it may run, "
        f"{advice or f'add `trust_{what}=True`'}"
    )


def loaded_with(code: Code) -> list[Path]:
    """The files of a reward that is loaded: its own, and those of the modules beside it that were imported."""
    if not spelled(code.name).place.endswith(".py"):
        return list(code.files)
    folder, files = code.files[0].parent, set(code.files)
    beside: dict[str, bool] = {}  # by folder: of thousands of modules, few lie near a reward
    for file in _imported(code):
        with suppress(OSError, ValueError):
            place = os.path.dirname(file)
            if place not in beside:
                beside[place] = _lies_in(Path(place).resolve(), folder)
            if beside[place] and _lies_in(path := Path(file).resolve(), folder) and path.is_file():
                files.add(path)
    return sorted(files)


def _imported(code: Code) -> Iterator[str]:
    """The files of all modules in the process that runs the code; ours do not count."""
    if code.python is not None:
        yield from map(str, _elsewhere.get(code.place, ()))
        return
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and name.partition(".")[0] != __name__.partition(".")[0]:
            yield file


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is in the folder, and not of an installed package or of Python itself."""
    installed = {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(sys.base_prefix)
    return path.is_relative_to(folder) and not installed


def _known(place: str) -> set[str]:
    """The digests under which code at a place has been named."""
    known = {digest for named, digest in _named if named == place}
    folder = _folder()
    if folder is not None:
        with suppress(OSError):
            known |= {path.name for path in (folder / _hash(place)).iterdir()}
    return known


def _folder() -> Path | None:
    if os.environ.get("IMPLICIT_DIFFUSION_CACHE") in ("", "off"):
        return None
    with suppress(RuntimeError):  # nobody's home
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        state = state if state.is_absolute() else Path.home() / ".local" / "state"
        return state / "implicit-diffusion" / "rewards"
    return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sources(module: str) -> tuple[Path, ...]:
    """The files that an import of a module would run, those of its packages first."""
    files, path, parts = [], None, module.split(".")
    for i in range(len(parts)):
        spec = _find(".".join(parts[: i + 1]), path)
        if spec is None:
            raise InvalidInputError(
                f"`reward`: no module {module!r}; run from its folder, or name it as FILE.py:function"
            )
        files += [Path(spec.origin).resolve()] if spec.origin and spec.has_location else []
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return tuple(files)


def _find(name: str, path: list[str] | None) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, which would import the packages above."""
    if "." in name and path is None:
        return None
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
        if spec is not None:
            return spec
    return None
