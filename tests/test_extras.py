"""What runs without the extras, and what a missing one says."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import implicit_diffusion as idf
from implicit_diffusion.extras import EXTRA_OF, EXTRAS, require
from tests.helpers.lower_bounds import lower_bounds

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "implicit_diffusion"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}  # where the module has another name
BROUGHT_ALONG = {"huggingface_hub"}  # by diffusers and by datasets

BLOCKING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def run_without(modules, program, *arguments):
    """A Python program in a process of its own, where these modules cannot be imported."""
    program = f"BLOCKED = set({sorted(modules)!r})\n{BLOCKING}\n{program}"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)


def requirements(extra):
    return {re.split(r"[<>=~!\[ ]", line)[0] for line in PROJECT["optional-dependencies"][extra]}


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_bring_their_modules(extra):
    brought = {DISTRIBUTIONS.get(module, module) for module in EXTRAS[extra] if module not in BROUGHT_ALONG}
    assert brought == requirements(extra)
    assert not brought & {re.split("[<>=]", line)[0] for line in PROJECT["dependencies"]}


def test_all_is_all_and_developers_have_it():
    extras = PROJECT["optional-dependencies"]
    in_all = [name for name in EXTRAS if name != "wandb"]  # which sends to a service
    assert extras["all"] == [f"implicit-diffusion[{','.join([*in_all[:2], 'ot', *in_all[2:]])}]"]
    assert "implicit-diffusion[all,wandb]" in extras["dev"] and "implicit-diffusion[all]" in extras["docs"]


def test_the_oldest_versions_are_older_than_those_tested():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    for line in lower_bounds():
        name, oldest = line.split("==")  # every requirement has a lower bound, and nothing else
        assert version(oldest) <= version(pins[name]), line


def version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("post")[0]))


def test_nothing_imports_the_transport_library():
    assert not [file for file in SOURCE.rglob("*.py") if re.search(r"^\s*(import|from) ot\b", file.read_text(), re.M)]


WITHOUT_EXTRAS = """
import types
import torch
import implicit_diffusion as idf

for namespace in [idf, *(v for n in idf.__all__ if isinstance(v := getattr(idf, n), types.ModuleType))]:
    for name in namespace.__all__:
        getattr(namespace, name)

mixture = idf.GaussianMixture(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
reward, optimizer = idf.Reward(lambda x: x[:, 0]), torch.optim.SGD(mixture.parameters(), lr=0.1)
start = mixture.sample(16, idf.Noise(1))
loop = idf.Single(mixture, idf.ULA(0.1), reward, optimizer, particles=start, noise=idf.Noise(0), weighted=True)
loop.step()

denoiser = idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck(torch.zeros(2), 0.5)
chain = idf.Chain(denoiser, idf.tables.ou_reverse_sde(4, 2.0), (2,))
optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
queue = idf.Queue(chain, reward + 0.5 * idf.PathKL(), optimizer, batch=3, noise=idf.Noise(0))
idf.fit(queue, 10, directory=sys.argv[1])
seen = idf.evaluate(chain, lambda x: x[:, 0], idf.Noise(1), starts=8, repeats=4)
print(float(idf.evaluation.bound(seen, 0.5).j) < 10, BLOCKED & set(sys.modules))
"""


@pytest.mark.slow
def test_sampling_and_training_run_without_extras(tmp_path):
    result = run_without({*EXTRA_OF, "ot"}, WITHOUT_EXTRAS, str(tmp_path / "run"))
    assert (result.returncode, result.stdout.strip()) == (0, "True set()"), result.stderr
    assert "10/10" in result.stderr  # progress in plain lines


MISSING = """
import torch
import implicit_diffusion as idf

try:
    {call}
except idf.errors.MissingExtraError as error:
    print(error)
"""
PLACES = [
    ('idf.load_pretrained("digits")', "diffusers", "diffusers"),
    ('idf.load_pretrained("digits")', "transformers", "diffusers"),
    ('idf.load_pretrained("nobody/nothing")', "huggingface_hub", "diffusers"),
    ("idf.denoisers.add_lora(torch.nn.Linear(2, 2), 2, idf.Noise(0), ['weight'])", "peft", "diffusers"),
    ("from implicit_diffusion.digits.data import load_digits; load_digits()", "sklearn", "data"),
    ('from implicit_diffusion.potentials.plane import law; law("moons")', "sklearn", "data"),
    ("from implicit_diffusion.commands.shared.drawing import sheet; sheet(1, 1)", "matplotlib", "cli"),
]


IN_FORKS = """
import json, os, traceback
import torch, implicit_diffusion, implicit_diffusion.errors

for module, program in json.loads(sys.argv[1]):
    assert module not in sys.modules
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        BLOCKED.add(module)
        exec(program)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
"""


@pytest.mark.slow
def test_a_missing_extra_names_its_command():
    """In forks of one process, which has imported nothing but torch."""
    programs = [(module, MISSING.format(call=call)) for call, module, _ in PLACES]
    result = run_without((), IN_FORKS, json.dumps(programs))
    expected = [
        f"{module} is not installed; install it with: pip install 'implicit-diffusion[{extra}]'"
        for _, module, extra in PLACES
    ]
    assert (result.returncode, result.stdout.splitlines()) == (0, expected), result.stderr


@pytest.mark.parametrize(
    "module", ["tyro", *(pytest.param(m, marks=pytest.mark.slow) for m in EXTRAS["cli"][1:] if m != "tyro")]
)
def test_the_command_line_says_what_it_lacks(module):
    program = "from implicit_diffusion.__main__ import main\nsys.exit(main())"
    result = run_without({module}, program, "hexagon", "--help")
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == f"error: {module} is not installed; install it with: pip install 'implicit-diffusion[cli]'\n"
    )


def test_other_missing_modules_are_not_ours_to_explain():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        require("no_such_module")
    assert issubclass(idf.errors.MissingExtraError, ImportError)


def unguarded(tree):
    """Imports of the extras' modules without `require` above them in their function, with line numbers.

    An import that only type checkers read, and one whose absence is caught, need none.
    """
    for statement in tree.body:
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"):
            yield from _unguarded(statement, set())


def _unguarded(node, required):
    if isinstance(node, ast.FunctionDef):
        required = set(required)
    if isinstance(node, ast.Try) and any(
        h.type and "ModuleNotFoundError" in ast.unparse(h.type) for h in node.handlers
    ):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
        required |= {argument.value for argument in node.args}
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for module in {name.partition(".")[0] for name in names} & EXTRA_OF.keys() - required:
            yield node.lineno, module
    for child in ast.iter_child_nodes(node):
        yield from _unguarded(child, required)


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_every_import_of_an_extra_is_guarded(file):
    place = file.relative_to(SOURCE).as_posix()
    elsewhere = (
        {"PIL"} if place == "scorers/messages.py" else set()
    )  # in another environment, which names what it lacks
    behind_main = set(EXTRAS["cli"]) if "command_line" in place else set()  # which checks
    lines = unguarded(ast.parse(file.read_text(encoding="utf-8")))
    assert [(line, module) for line, module in lines if module not in elsewhere | behind_main] == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import rich", [1]),
        ("def f():\n    from rich.table import Table", [2]),
        ("def f():\n    require('rich')\n    from rich.table import Table\n    import tyro", [4]),
        ("def f():\n    require('rich')\ndef g():\n    import rich", [4]),
        ("if TYPE_CHECKING:\n    import rich", []),
        ("def f():\n    try:\n        import rich\n    except ModuleNotFoundError:\n        pass", []),
        ("import torch", []),
    ],
)
def test_the_search_sees_unguarded_imports(source, lines):
    assert [line for line, _ in unguarded(ast.parse(source))] == lines
