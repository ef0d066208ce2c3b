"""The documentation builds without a warning, and its Python examples run.

The ```python blocks of a page run in order, in one namespace and in an empty folder; `<!-- skip: next -->` before a
block leaves it out.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
GENERATED = {"_build", "api"}
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not GENERATED & set(page.relative_to(ROOT).parts)]
# Pages that show all that their examples print.
PRINTED = {"docs/howto/flow.md", "docs/howto/python.md", "docs/mathematics/queue.md"}
SLOW = {"docs/howto/memory.md"}
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


def test_the_readme_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_examples(ROOT / "README.md")
    check_printed(ROOT / "README.md", capsys.readouterr().out)


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
