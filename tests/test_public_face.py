"""What is public: few flat names, namespaces for the rest, and documentation that uses nothing else."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

import implicit_diffusion as idf

ROOT = Path(__file__).parents[1]
GENERATED = {"_build", "api"}
NAMESPACES = {name for name in idf.__all__ if isinstance(getattr(idf, name), ModuleType)}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
PAGES = [page for page in PAGES if page.exists() and not GENERATED & set(page.relative_to(ROOT).parts)]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_a_first_program_needs_few_names():
    assert {
        *(
            "denoisers",
            "design",
            "errors",
            "evaluation",
            "gradients",
            "loops",
            "models",
            "objectives",
            "potentials",
            "runs",
        ),
        *("samplers", "tables"),
    } == NAMESPACES
    assert len(set(idf.__all__) - NAMESPACES) <= 30


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def private(source):
    """Imports other than `import implicit_diffusion as idf`, and uses of `idf` that are not public names."""
    tree = ast.parse(source)
    inside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "implicit_diffusion":
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "implicit_diffusion" and (alias.name, alias.asname) != (
                    "implicit_diffusion",
                    "idf",
                ):
                    yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and id(node) not in inside:
            owner, *names = ast.unparse(node).split(".")
            if owner == "idf" and names != ["__version__"] and "(" not in "".join(names) and not is_public(names):
                yield ast.unparse(node)


def is_public(names):
    """Whether `idf.a.b.c` begins with a public name, which may have attributes of its own."""
    if names[0] not in idf.__all__:
        return False
    return names[0] not in NAMESPACES or (len(names) > 1 and names[1] in getattr(idf, names[0]).__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_documentation_uses_public_names(page):
    assert [use for block in blocks(page) for use in private(block)] == []


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_use_public_names(file):
    assert list(private(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import implicit_diffusion as idf\nidf.Chain.pretrained()", []),
        ("idf.evaluation.bound(x).j, idf.__version__", []),
        ("from implicit_diffusion import Chain", ["from implicit_diffusion import Chain"]),
        ("import implicit_diffusion.noise", ["import implicit_diffusion.noise"]),
        ("idf.tables.verified.markdown()", ["idf.tables.verified.markdown"]),
        ("idf.Quue(1)", ["idf.Quue"]),
        ("idf.loops", ["idf.loops"]),
    ],
)
def test_the_search_sees_what_is_private(source, uses):
    assert list(private(source)) == uses
