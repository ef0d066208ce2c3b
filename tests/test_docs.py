"""The documentation builds without a warning, and its Python examples run.

The ```python blocks of a page run in order, in one namespace and in an empty folder; `<!-- skip: next -->` before a
block leaves it out.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
GENERATED = {"_build", "api"}
WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if not GENERATED & set(page.relative_to(ROOT).parts)]
PAGES = [ROOT / "README.md", *WRITTEN]


def run_examples(page):
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    for example in document.examples():
        example.evaluate()
    return document.namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(page)


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


def test_docs_build_without_warnings(tmp_path):
    docs = ROOT / "docs"
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    result = subprocess.run([*build, str(docs), str(tmp_path / "html")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "html" / "index.html").exists()
