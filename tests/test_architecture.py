"""The house: who may import whom, how large files and folders may be, what an import costs, what the wheel ships."""

import ast
import subprocess
import sys
import zipfile
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "implicit_diffusion"
PACKAGE = "implicit_diffusion"
FILES = sorted(SOURCE.rglob("*.py"))

# From the ground up: a room imports rooms below its own floor only, and none on it.
FLOORS = [
    {"errors", "lazily", "showing"},
    {"extras", "processes", "rounding"},
    {"compiled", "files", "frozen", "function_checks", "noise", "particles", "reward_values", "scorers"},
    {"global_generators", "tables"},
    {"denoisers", "potentials"},
    {"objectives", "samplers"},
    {"gradients"},
    {"models"},
    {"evaluation"},
    {"design"},
    {"loops"},
    {"runs"},
    {"digits"},
    {"commands"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Inside `commands`, likewise. Every room may import `shared`; every other import between two rooms is listed.
COMMAND_FLOORS = [
    {"__init__", "command_line", "rewards"},
    {"shared"},
    {"compare", "ebm", "finetune", "hexagon", "pretrain", "recovery", "score", "theory", "tilt"},
    {"sample"},
    {"registry"},
    {"resuming"},
    {"reporting", "sweep"},
]
COMMAND_LEVEL = {room: level for level, rooms in enumerate(COMMAND_FLOORS) for room in rooms}
ARROWS = {
    ("shared", "rewards"),
    ("finetune", "rewards"),
    ("compare", "rewards"),
    ("tilt", "rewards"),
    ("sample", "finetune"),
    ("sweep", "rewards"),
    ("resuming", "rewards"),
    ("resuming", "registry"),
    ("reporting", "registry"),
    ("reporting", "resuming"),
    ("sweep", "resuming"),
    ("sweep", "finetune"),
}
MOST_ARROWS = 12

MOST_LINES = 300  # of a file
MOST_FILES = 15  # of Python in a folder, `__init__` among them

# Kept out of `import implicit_diffusion`: it costs what torch costs.
HEAVY = {"accelerate", "datasets", "diffusers", "matplotlib", "ot", "peft", "rich", "sklearn", "transformers", "tyro"}


def name_of(file):
    return file.relative_to(SOURCE).as_posix()


def room_of(file):
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def command_room_of(file):
    return file.relative_to(SOURCE).parts[1].removesuffix(".py")


@cache
def parse(file):
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def package_of(file):
    return [PACKAGE, *file.relative_to(SOURCE).parts[:-1]]


def exists(parts):
    return SOURCE.joinpath(*parts).is_dir() or SOURCE.joinpath(*parts).with_suffix(".py").exists()


def imports(tree, package, nodes=ast.walk):
    """The dotted names of ours that a module of `package` imports, as parts below ours, with line numbers.

    The version stands at the top of the package and is everybody's.
    """
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == PACKAGE and target[1:] != ["__version__"]:
                yield target[1:], node.lineno


def imported_rooms(tree, package, floor=()):
    """The rooms on a floor of ours that a module imports, with line numbers; `__init__` is the public face."""
    for target, line in imports(tree, package):
        if tuple(target[: len(floor)]) == floor:
            rest = target[len(floor) : len(floor) + 1]
            yield (rest[0] if rest and exists([*floor, *rest]) else "__init__"), line


def when_imported(tree):
    """The statements that run when a module is imported: not those in functions, nor those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for part in node.orelse:
                yield part
                yield from when_imported(part)
            continue
        yield node
        yield from when_imported(node)


def needs(file):
    """The files that must have been imported before a file's own import ends."""
    needed = set()
    for target, _ in imports(parse(file), package_of(file), when_imported):
        for parts in (target, target[:-1]):  # a module, or a name in one
            modules = (SOURCE.joinpath(*parts).with_suffix(".py"), SOURCE.joinpath(*parts, "__init__.py"))
            if module := next((module for module in modules if module.is_file()), None):
                needed.add(module)
                break
    return needed - {file}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_floors(file):
    room = room_of(file)
    assert room in LEVEL, f"{name_of(file)} stands on no floor: give it one in FLOORS"
    for other, line in imported_rooms(parse(file), package_of(file)):
        assert other in LEVEL, f"{other} stands on no floor: give it one in FLOORS"
        assert other == room or LEVEL[other] < LEVEL[room], f"{name_of(file)}:{line}: {room} may not import {other}"


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) == "commands"], ids=name_of)
def test_floors_inside_commands(file):
    room = command_room_of(file)
    assert room in COMMAND_LEVEL, f"{name_of(file)} stands on no floor: give it one in COMMAND_FLOORS"
    for other, line in imported_rooms(parse(file), package_of(file), ("commands",)):
        where = f"{name_of(file)}:{line}: {room} may not import {other}"
        assert other == room or COMMAND_LEVEL[other] < COMMAND_LEVEL[room], where
        assert other in (room, "shared") or (room, other) in ARROWS, where


def test_arrows_inside_commands_are_few_and_all_in_use():
    drawn = {
        (command_room_of(file), other)
        for file in FILES
        if room_of(file) == "commands"
        for other, _ in imported_rooms(parse(file), package_of(file), ("commands",))
    }
    drawn = {(room, other) for room, other in drawn if other not in (room, "shared")}
    assert drawn <= ARROWS
    assert len(ARROWS) <= MOST_ARROWS


def test_no_module_needs_itself_to_be_imported():
    try:
        TopologicalSorter({file: needs(file) for file in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" needs ".join(map(name_of, reversed(error.args[1]))))


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import torch", []),
        ("import implicit_diffusion", ["__init__"]),
        ("import implicit_diffusion.noise", ["noise"]),
        ("from implicit_diffusion import Noise", ["__init__"]),
        ("from implicit_diffusion import noise", ["noise"]),
        ("from implicit_diffusion import __version__", []),
        ("from ..errors import InvalidInputError", ["errors"]),
        ("from .. import Noise", ["__init__"]),
        ("from . import queue", ["loops"]),
        ("def f():\n    from implicit_diffusion.runs.console import progress", ["runs"]),
    ],
)
def test_the_walk_sees_every_form_of_import(source, rooms):
    assert [room for room, _ in imported_rooms(ast.parse(source), [PACKAGE, "loops"])] == rooms


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("from implicit_diffusion.commands.shared import page", ["shared"]),
        ("from ..shared.page import Page", ["shared"]),
        ("from implicit_diffusion.commands import registry, nothing", ["registry", "__init__"]),
        ("from implicit_diffusion.runs import fit", []),
    ],
)
def test_the_walk_sees_the_rooms_of_commands(source, rooms):
    package = [PACKAGE, "commands", "ebm"]
    assert [room for room, _ in imported_rooms(ast.parse(source), package, ("commands",))] == rooms


def test_the_walk_tells_what_runs_at_import():
    source = (
        "import a\nclass C:\n    import b\ndef f():\n    import no\nif TYPE_CHECKING:\n    import no\nelse:\n"
        "    import c\ntry:\n    import d\nexcept ImportError:\n    import e\nf = lambda: __import__('no')"
    )
    names = [node.names[0].name for node in when_imported(ast.parse(source)) if isinstance(node, ast.Import)]
    assert names == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_small(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{name_of(file)} has {lines} lines"
    assert file.stem not in ("utils", "helpers", "misc"), f"{name_of(file)}: name it by what it does"


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=lambda path: path.name)
def test_folders_are_small(folder):
    files = sorted(file.name for file in folder.glob("*.py"))
    assert len(files) <= MOST_FILES, f"{len(files)} files: {', '.join(files)}"


def test_importing_costs_only_torch():
    program = f"import implicit_diffusion, sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_wheel_ships_every_file_of_the_package(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert SOURCE / "py.typed" in files
    assert {f"{PACKAGE}/{name_of(path)}" for path in files} <= shipped
    assert any(name.endswith("/licenses/LICENSE") for name in shipped)
