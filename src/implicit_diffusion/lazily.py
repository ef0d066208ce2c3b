"""Public names of a package, each imported when it is first asked for.

Python takes the lock of a submodule before it imports the package around it. A package that imports its submodules
therefore waits, in one thread, for a submodule that another thread has begun to import, and that waits for the package:
a deadlock, which Python breaks by an ImportError. So no package here imports what lies in it. Its `__init__` says where
its names are by imports that only type checkers see, and these are read when a name is first used.

`lazy_loader` does the same from a `.pyi` stub beside each `__init__`, but only for names that are defined below the
package (it refuses `from ..`). Namespaces here also hold names of the floors below, such as `denoisers.frozen_copy`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from functools import cache
from typing import Any


@cache
def homes(package: str) -> dict[str, tuple[str, str]]:
    """Name → (module, name there) of all that a package imports under `if TYPE_CHECKING`, except its submodules."""
    loader: Any = sys.modules[package].__spec__.loader  # type: ignore[union-attr]
    blocks = [node for node in ast.parse(loader.get_source(package)).body if isinstance(node, ast.If)]
    imports = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
    imports = [line for line in imports if line.module != package]
    return {alias.asname or alias.name: (str(line.module), alias.name) for line in imports for alias in line.names}


def attribute(package: str, name: str) -> Any:
    """The public name or submodule `package.name`, which is then kept in the package for the next use.

    Raises:
        AttributeError: the package has neither.
    """
    if name in homes(package):
        module, original = homes(package)[name]
        value = getattr(importlib.import_module(module), original)
    elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
        return importlib.import_module(f"{package}.{name}")
    else:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    setattr(sys.modules[package], name, value)
    return value
