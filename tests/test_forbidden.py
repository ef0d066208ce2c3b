"""What must not appear in the source: pickles, devices by name, randomness out of nowhere, flags in the library."""

import ast
import re

import pytest

from tests.test_architecture import FILES, name_of, parse, room_of

# torch initialises weights, and drops out, from the global generator: these files may seed it, inside fork_rng only.
SEEDED = {"commands/pretrain/training.py", "digits/classifiers.py"}

# Rewards of the user's own may draw from the global generators: this file keeps their states, and the caller's.
KEEPS_GENERATORS = {"global_generators.py"}
SEEDS_THEM = {"scorers/child.py"}  # they are its own, in a process that computes a reward and nothing else
OF_SEEDS = ("import random", "np.random.seed", "torch.manual_seed")
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

# Names that say nothing of what they stand for.
NAMELESS = {"alike", "found", "told"}

# Words with dashes in the strings of the library that are not flags of ours.
OTHERS_FLAGS = {"--local-dir"}  # of the program `hf`


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
def test_nothing_forbidden(file):
    allowed = OF_GENERATORS if name_of(file) in KEEPS_GENERATORS else ()
    allowed += OF_SEEDS if name_of(file) in SEEDS_THEM else ()
    offences = [(line, what) for line, what in violations(parse(file), name_of(file)) if what not in allowed]
    assert [f"{name_of(file)}:{line}: {what}" for line, what in offences] == []


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


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) not in ("commands", "cli")], ids=name_of)
def test_the_library_names_arguments_not_flags(file):
    """`commands.command_line.flags` makes flags of them, where a command line is what was given."""
    constants = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Constant)]
    texts = [(node.lineno, node.value) for node in constants if isinstance(node.value, str)]
    flags = [(line, flag) for line, text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)]
    assert [(line, flag) for line, flag in flags if flag not in OTHERS_FLAGS] == []


def names_given(tree):
    """The names that a module gives: to variables, arguments, attributes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_names_say_what_they_stand_for(file):
    assert not NAMELESS & set(names_given(parse(file)))


def test_the_search_sees_every_way_to_give_a_name():
    source = (
        "a = 1\ndef b(c, *d, e=0): ...\nself.f = 1\nfor g in x: ...\nwith x as h: ...\n[i for i in x]\nclass K: ..."
    )
    assert set(names_given(ast.parse(source))) == set("abcdefghiK")
