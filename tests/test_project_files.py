"""What stands around the code agrees with it: version, changelog, hosted CI, citation, contributing."""

import re
from pathlib import Path

import pytest
import yaml

import implicit_diffusion as idf

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def targets():
    """The targets of the Makefile that are commands, from its .PHONY line."""
    return set(re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split())


def test_the_version_is_in_one_place():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    version = re.compile(rf"(?<![\d.]){re.escape(idf.__version__)}(?![\d.])")
    source = ROOT / "src" / "implicit_diffusion"
    holders = [file for file in source.rglob("*.py") if version.search(file.read_text(encoding="utf-8"))]
    assert [file.relative_to(source).as_posix() for file in holders] == ["__init__.py"]


def test_the_changelog_has_the_version_below_what_is_unreleased():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert ".dev" in idf.__version__ or headings[1].split()[0] == idf.__version__


def test_hosted_ci_runs_the_targets_of_the_makefile():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands
    for make, *names in commands:
        assert make == "make"
        assert set(names) <= targets()
    assert {"test", "test-all", "lint", "types"} <= {name for _, *names in commands for name in names}


def test_the_citation_names_software_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["title"] == "implicit-diffusion"
    assert "version" not in citation  # it would be a second place
    (paper,) = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "docs/architecture.md"])
def test_files_and_targets_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^make [a-z -]+", text, re.MULTILINE) + re.findall(r"`(make [a-z -]+)`", text)
    assert {name for command in commands for name in command.split()[1:]} <= targets()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:src|tests|docs(?!/_build)|benchmarks|examples)/[\w./-]*)`", text):
        assert ROOT.joinpath(path).exists(), path
