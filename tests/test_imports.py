"""Importing: from several threads at once, name by name, and all the names that packages promise."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

NAMESPACES = (
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
    "samplers",
    "tables",
)

IN_THREADS = """
import importlib, random, sys, threading
from importlib.util import find_spec
from pathlib import Path

root = Path(find_spec("implicit_diffusion").origin).parent
files = [file.relative_to(root).with_suffix("") for file in root.rglob("*.py") if file.name != "__main__.py"]
names = [".".join(("implicit_diffusion", *file.parts)).removesuffix(".__init__") for file in files]
random.Random(int(sys.argv[1])).shuffle(names)
gate, failed = threading.Barrier(16), []

def load(mine):
    gate.wait()
    for name in mine:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed.append(f"{name}: {error!r}")

threads = [threading.Thread(target=load, args=(names[i::16],)) for i in range(16)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len(names) > 100
print(failed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_threads_may_import_whatever_they_want_at_once(order):
    """Each thread takes the lock of a submodule first, and then needs the packages around it."""
    result = subprocess.run([sys.executable, "-c", IN_THREADS, str(order)], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


@pytest.mark.parametrize("package", ["", *(f".{name}" for name in NAMESPACES)])
def test_packages_keep_their_promises(package):
    module = importlib.import_module(f"implicit_diffusion{package}")
    for name in module.__all__:
        value = getattr(module, name)
        assert value is getattr(module, name) and name in dir(module)
        if hasattr(value, "__module__") and not isinstance(value, dict):
            assert value.__name__ == name and value.__module__.startswith("implicit_diffusion")
    with pytest.raises(AttributeError, match=f"module 'implicit_diffusion{package}' has no attribute 'Quue'"):
        module.Quue  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Quue'"):
        exec(f"from implicit_diffusion{package} import Quue")


@pytest.mark.parametrize("package", ["", *(f".{name}" for name in NAMESPACES)])
def test_no_public_name_is_also_that_of_a_submodule(package):
    """Importing the submodule would put it in the place of the name."""
    module = importlib.import_module(f"implicit_diffusion{package}")
    submodules = {submodule.name for submodule in pkgutil.iter_modules(getattr(module, "__path__", []))}
    assert submodules & set(module.__all__) <= set(NAMESPACES)


def test_packages_lead_to_what_lies_in_them():
    program = "import implicit_diffusion as idf; print(idf.evaluation.bounds.bound is idf.evaluation.bound)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr
