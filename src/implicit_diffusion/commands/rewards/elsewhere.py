"""Rewards of the user's own that the python of another environment computes, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from implicit_diffusion.commands.rewards.trust import code_of, has_imported, is_own, remember, spelled
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.reward_values import of_tensors, takes_condition, with_metadata
from implicit_diffusion.scorers import Scorer


def load_elsewhere(name: str, python: Path, timeout: float) -> Callable[..., Tensor]:
    """The reward "FILE.py:function" in a process of its own; nothing of the file runs in this one.

    Args:
        name: of the reward, whose arguments are literals.
        python: that runs the file.
        timeout: seconds that it may take to load, and to score a batch.

    Raises:
        InvalidInputError: from `code_of`, `Scorer` and `takes_condition`.
    """
    place, function, call = spelled(name)
    code = code_of(name, python)
    remember(code)
    scorer = Scorer(place, function, call, python=python, timeout=timeout, code=code.content)
    has_imported(code, scorer.files)
    reward = with_metadata(scorer)
    takes_condition(reward)
    return of_tensors(reward)


def check_python(rewards: Sequence[str], python: Path | None) -> None:
    """Raise `InvalidInputError` where another python is given, and all rewards are computed in this process."""
    if python is not None and not any(map(is_own, rewards)):
        raise InvalidInputError(
            f"`reward_python` computes rewards of your own, FILE.py:function, and `reward` {' '.join(rewards)} is not "
            "one; leave it out"
        )
