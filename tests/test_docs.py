"""The documentation builds without a warning, and its Python examples run, those in docstrings among them.

The ```python blocks of a page run in order, in one namespace and in an empty folder; `<!-- skip: next -->` before a
block leaves it out.
"""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import implicit_diffusion

ROOT = Path(__file__).parents[1]
GENERATED = {"_build", "api"}
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not GENERATED & set(page.relative_to(ROOT).parts)]
# Pages that show all that their examples print.
PRINTED = {
    "docs/howto/evidence.md",
    "docs/howto/design.md",
    "docs/howto/flow.md",
    "docs/howto/implicit-differentiation.md",
    "docs/howto/python.md",
    "docs/mathematics/estimators.md",
    "docs/mathematics/queue.md",
    "docs/mathematics/tilted.md",
}
SLOW = {
    f"docs/{page}.md"
    for page in (
        "howto/class-conditional",
        "howto/ebm",
        "howto/evidence",
        "howto/extend",
        "howto/finetune",
        "howto/implicit-differentiation",
        "howto/memory",
        "howto/potentials",
        "howto/text-to-image",
        "mathematics/chains",
        "mathematics/estimators",
        "mathematics/path-kl",
        "mathematics/released-code",
        "mathematics/samplers",
        "mathematics/surrogate",
        "mathematics/tilted",
        "mathematics/weights",
    )
}
NUMBER = re.compile(r"\d+\.\d+")


def run_examples(page):
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    for example in document.examples():
        example.evaluate()
    return document.namespace


def pages():
    names = {page: page.relative_to(ROOT).as_posix() for page in WRITTEN}
    return [pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for page, name in names.items()]


@pytest.mark.parametrize("page", pages())
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(page)
    if page.relative_to(ROOT).as_posix() in PRINTED:
        check_printed(page, capsys.readouterr().out)


def check_printed(page, printed):
    """To the last digit but one: rounding differs between processors."""
    shown = re.findall(r"```python\n[^`]*```\n\n```text\n(.*?)\n```", page.read_text(encoding="utf-8"), re.DOTALL)
    printed, said = printed.strip(), "\n".join(shown)
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", said)
    assert [float(x) for x in NUMBER.findall(printed)] == pytest.approx(
        [float(x) for x in NUMBER.findall(said)], rel=0.05
    )


@pytest.mark.slow
def test_the_readme_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(ROOT / "README.md")
    check_printed(ROOT / "README.md", capsys.readouterr().out)


SOURCE = ROOT / "src" / "implicit_diffusion"
WITH_EXAMPLES = [
    file for file in sorted(SOURCE.rglob("*.py")) if re.search(r"^ +>>> ", file.read_text("utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=lambda file: file.relative_to(SOURCE).as_posix())
def test_examples_in_docstrings_print_what_they_say(file):
    """A ">>>" line to run, what it prints below it; each docstring by itself, with all that it imports."""
    module = importlib.import_module(".".join(file.relative_to(SOURCE.parent).with_suffix("").parts))
    examples = [found for found in doctest.DocTestFinder().find(module, globs={}) if found.examples]
    assert examples
    for example in examples:
        printed = []
        result = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
        assert result.attempted and not result.failed, "".join(printed)


def test_every_kernel_and_particle_loop_shows_itself_running():
    kernels, particle_loops = ("ULA", "MALA", "HMC", "Underdamped"), ("Single", "NestedParticles", "Unrolled")
    for name in kernels:
        assert ">>> kernel = " in getattr(implicit_diffusion.samplers, name).__doc__, name
    for name in particle_loops:
        assert ">>> loop = " in getattr(implicit_diffusion.loops, name).__doc__, name


def test_examples_share_a_namespace_and_may_be_skipped(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n<!-- skip: next -->\n\n```python\nx = 3\n```\n\n```python\ny = x + 1\n```\n\n"
        "```text\nnot python\n```\n"
    )
    namespace = run_examples(page)
    assert (namespace["x"], namespace["y"]) == (1, 2)
    page.write_text("```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_examples(page)


@pytest.mark.slow
def test_docs_build_without_warnings(tmp_path):
    docs = ROOT / "docs"
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    result = subprocess.run([*build, str(docs), str(tmp_path / "html")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "html" / "index.html").exists()
