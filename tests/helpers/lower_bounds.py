"""The oldest versions that pyproject.toml allows, as constraints for pip: `make test-oldest` installs them.

python tests/helpers/lower_bounds.py > constraints-oldest.txt
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
RUNTIME = ("diffusers", "data", "ot", "cli", "tensorboard", "wandb")  # that users install; tools are of the day


def lower_bounds():
    """Requirement lines `name==oldest` of the package and of its extras."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in RUNTIME for line in project["optional-dependencies"][extra]]
    return [re.sub(r"^([\w.-]+)>=([\w.]+)$", r"\1==\2", line) for line in lines]


if __name__ == "__main__":
    print("\n".join(lower_bounds()))
