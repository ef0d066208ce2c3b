"""The house: who may import whom, what an import costs, and what must not appear in the source."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "implicit_diffusion"
PACKAGE = "implicit_diffusion"
FILES = sorted(SOURCE.rglob("*.py"))

# From the ground up; rooms on one floor do not know each other.
FLOORS = [
    {"errors", "lazily", "showing"},
    {"rounding"},
    {"compiled", "files", "frozen", "function_checks", "noise", "particles", "reward_values"},
    {"global_generators", "tables"},
    {"denoisers", "potentials"},
    {"objectives", "samplers"},
    {"gradients"},
    {"models"},
    {"evaluation"},
    {"loops"},
    {"runs"},
    {"digits"},
    {"commands"},
    {"__init__"},
    {"options"},
    {"command_line"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Kept out of `import implicit_diffusion`: it costs what torch costs.
HEAVY = {"accelerate", "datasets", "diffusers", "matplotlib", "ot", "peft", "rich", "sklearn", "transformers", "tyro"}

# torch initialises weights, and drops out, from the global generator: these files may seed it, inside fork_rng only.
SEEDED = {"commands/pretrain/training.py", "digits/classifiers.py"}

# Rewards of the user's own may draw from the global generators: this file keeps their states, and the caller's.
KEEPS_GENERATORS = {"global_generators.py"}
OF_GENERATORS = ("import random", "np.random.RandomState", "np.random.get_state", "np.random.set_state")

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN = {"torch.load", "torch.save", "torch.seed", "torch.set_rng_state"}
SEEDS = (
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.random.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.seed",
)
NUMPY_RANDOM = {"SeedSequence", "default_rng", "Generator", "PCG64", "Philox"}
TORCH_DRAWS = {"bernoulli", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm"}
LIKE_DRAWS = {"rand_like", "randint_like", "randn_like"}
IN_PLACE_DRAWS = {"bernoulli_", "exponential_", "log_normal_", "normal_", "random_", "uniform_"}


def name_of(file):
    return file.relative_to(SOURCE).as_posix()


def room_of(file):
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def parse(file):
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def exists(parts):
    return SOURCE.joinpath(*parts).is_dir() or SOURCE.joinpath(*parts).with_suffix(".py").exists()


def imported_rooms(tree, package):
    """The rooms of ours that a module of `package` imports, with line numbers; `__init__` is the public face."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == PACKAGE:
                yield (target[1] if len(target) > 1 and exists(target[1:2]) else "__init__"), node.lineno


def dotted(node):
    """`torch.cuda.manual_seed` for such an expression, "" for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def violations(tree, name=""):
    """What a module does that no module may do: pickles, devices by name, randomness out of nowhere."""
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)
        for inner in ast.walk(node)
        if name in SEEDED
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in PICKLES | {"random"}:
                    yield node.lineno, f"import {module}"
        elif isinstance(node, ast.Attribute):
            path = dotted(node)
            if path in FORBIDDEN or (path.startswith(SEEDS) and id(node) not in forked):
                yield node.lineno, path
            numpy = path.removeprefix("numpy.random.").removeprefix("np.random.")
            if numpy != path and numpy not in NUMPY_RANDOM:
                yield node.lineno, path
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            if method == "cuda":
                yield node.lineno, ".cuda()"
            draws = dotted(node.func) == f"torch.{method}" and method in TORCH_DRAWS
            draws = draws or method in LIKE_DRAWS | IN_PLACE_DRAWS
            if draws and id(node) not in forked and all(keyword.arg != "generator" for keyword in node.keywords):
                yield node.lineno, f"{method}(...) without generator="


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_floors(file):
    room = room_of(file)
    assert room in LEVEL, f"{name_of(file)} stands on no floor: give it one in FLOORS"
    package = [PACKAGE, *file.relative_to(SOURCE).parts[:-1]]
    for other, line in imported_rooms(parse(file), package):
        assert other in LEVEL, f"{other} stands on no floor: give it one in FLOORS"
        assert other == room or LEVEL[other] < LEVEL[room], f"{name_of(file)}:{line}: {room} may not import {other}"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import torch", []),
        ("import implicit_diffusion", ["__init__"]),
        ("import implicit_diffusion.noise", ["noise"]),
        ("from implicit_diffusion import Noise", ["__init__"]),
        ("from implicit_diffusion import noise", ["noise"]),
        ("from ..errors import InvalidInputError", ["errors"]),
        ("from .. import Noise", ["__init__"]),
        ("from . import queue", ["loops"]),
        ("def f():\n    from implicit_diffusion.runs.console import progress", ["runs"]),
    ],
)
def test_the_walk_sees_every_form_of_import(source, rooms):
    assert [room for room, _ in imported_rooms(ast.parse(source), [PACKAGE, "loops"])] == rooms


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_forbidden(file):
    allowed = OF_GENERATORS if name_of(file) in KEEPS_GENERATORS else ()
    found = [(line, what) for line, what in violations(parse(file), name_of(file)) if what not in allowed]
    assert [f"{name_of(file)}:{line}: {what}" for line, what in found] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import dump",
        "import random",
        "torch.load(path)",
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed_all(0)",
        "with torch.random.fork_rng():\n    torch.manual_seed(0)",
        "np.random.seed(0)",
        "model.cuda()",
        "torch.randn(3)",
        "torch.randn_like(x)",
        "x.normal_()",
        "nn.init.normal_(weight)",
    ],
)
def test_the_search_finds_what_is_forbidden(source):
    assert list(violations(ast.parse(source), "loops/queue.py"))


@pytest.mark.parametrize(
    "source",
    [
        "torch.Generator().manual_seed(0)",
        "torch.randn(3, generator=g)",
        "np.random.SeedSequence((1, 2))",
        "torch.cuda.mem_get_info()",
        "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)\n    torch.randint(3, (2,))",
    ],
)
def test_the_search_lets_the_rest_pass(source):
    assert not list(violations(ast.parse(source), "commands/pretrain/training.py"))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_rooms_are_small(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 330, f"{name_of(file)} has {lines} lines"


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
