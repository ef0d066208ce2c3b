"""What can go wrong, by name. Every error of ours is an `ImplicitDiffusionError` and the built-in error it resembles.

A message names the argument, says what was given and what would work.
"""

from typing import Any


class ImplicitDiffusionError(Exception):
    """Root of all errors that this package raises on purpose."""


class InvalidInputError(ImplicitDiffusionError, ValueError):
    """An argument, option, file or folder that cannot be used; raised before any long work."""


class NonAffineError(InvalidInputError):
    """A scheduler whose step is not affine in (x, u, ξ), or has hidden state: it is no table."""


class NonFiniteError(ImplicitDiffusionError, ArithmeticError):
    """NaN or infinity in a running computation; raised before it reaches the parameters or a file."""


class DivergenceError(ImplicitDiffusionError, ArithmeticError):
    """A training that runs away though its numbers are still finite; raised before its result replaces a sound one."""


class MemoryLimitError(ImplicitDiffusionError, MemoryError):
    """The predicted memory exceeds what the device has."""


class StorageError(ImplicitDiffusionError, OSError):
    """A file that cannot be written, or a folder that cannot be locked; what was there before is intact."""


class RewardError(ImplicitDiffusionError, RuntimeError):
    """A reward of the user's own that raised, or asked to exit, in the middle of a run."""


def check_type(name: str, value: object, kind: Any, advice: str) -> None:
    """Raise `InvalidInputError` where an argument is of another kind, with what would make it one."""
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise InvalidInputError(f"{name} must be of type {kind.__name__}, got {given}; {advice}")
