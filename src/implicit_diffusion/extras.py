"""Libraries that only parts of this package use, and the command that installs each.

`pip install implicit-diffusion` brings what sampling and training need. Diffusers' models, data sets and the command
line use more. Code that imports such a library calls `require` first, so that a missing one is an error of one line
that says what to install, and not a traceback.
"""

from __future__ import annotations

import importlib

from implicit_diffusion.errors import MissingExtraError

EXTRAS = {  # extra in pyproject.toml → modules that it brings
    "diffusers": ("accelerate", "diffusers", "huggingface_hub", "peft", "transformers"),
    "data": ("datasets", "PIL", "sklearn"),
    "cli": ("matplotlib", "rich", "tyro"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
EXTRA_OF = {module: extra for extra, modules in EXTRAS.items() for module in modules}


def require(*modules: str) -> None:
    """Import modules of the extras, so that the import statement that follows cannot fail.

    Raises:
        MissingExtraError: one is not installed, or needs another one of the extras that is not.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in EXTRA_OF:
                raise
            raise MissingExtraError(
                f"{missing} is not installed; install it with: pip install 'implicit-diffusion[{EXTRA_OF[missing]}]'"
            ) from error
