"""Attributes of terms: names, checked, and copies in which some attributes differ."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from implicit_diffusion.errors import InvalidInputError, shown

Term = TypeVar("Term")


def changed(term: Term, **attributes: Any) -> Term:
    """A copy of a term with other attributes; the term itself stays as it is."""
    other = copy.copy(term)
    vars(other).update(attributes)
    return other


def check_name(name: object) -> str:
    """The name of a term, which metrics and files report it by."""
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"name must be a word under which metrics report the term, got {shown(name)}")
    return name
