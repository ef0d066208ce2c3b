import re
from importlib import metadata

project = "implicit-diffusion"
author = "The implicit-diffusion authors"
project_copyright = author
try:
    release = metadata.version("implicit-diffusion")
except metadata.PackageNotFoundError:  # read from a source tree that is not installed
    release = "unknown"

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

html_theme = "furo"
html_title = "implicit-diffusion"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# One page per module, written anew at every build. An object is documented where it is defined, not where it is
# re-exported.
apidoc_modules = [
    {
        "path": "../src/implicit_diffusion",
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_default_options = {"ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
suppress_warnings = ["ref.python"]  # commands each have a Config and a Summary: their short names are ambiguous
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Docstrings are plain text with `code`, *emphasis* and indented formulas: (n, *event), |b_k| and x_ mean themselves.
default_role = "code"
SPANS = re.compile(r"(``.+?``|`[^`]+`|(?<![\w*(])\*(?=[^\s*])[^*]*(?<=[^\s*])\*(?![\w*]))", re.DOTALL)
MARKS = re.compile(r"[*|]|(?<=\w)_(?!\w)")


def restructure(app, what, name, obj, options, lines):
    """Turn such a docstring into reStructuredText, in place."""
    chunks, after_text = [], False
    for chunk in "\n".join(lines).split("\n\n"):
        formula = all(line.startswith("    ") for line in chunk.splitlines() if line) and chunk.strip()
        if formula and after_text:  # an indented paragraph below one that is not: shown as it stands
            chunks += ["::", chunk]
            continue
        spans = SPANS.split(chunk)
        spans[::2] = [MARKS.sub(r"\\\g<0>", text) for text in spans[::2]]
        chunks.append("".join(spans))
        after_text = not chunk.rstrip("\n").rpartition("\n")[2].startswith(" ")
    lines[:] = "\n\n".join(chunks).split("\n")


def setup(app):
    """Ahead of napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", restructure, priority=100)
