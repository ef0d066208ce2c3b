"""Checks of functions of samples: what is random is not taken for what mixes samples."""

import itertools

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.function_checks import FunctionWarning, check_separate

VALUES = torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("equal", [0, 1, 2, 3])
def test_a_random_function_that_agrees_with_itself_by_chance(equal):
    """Its first `equal` calls give the same values."""
    factors = itertools.chain([1.0] * equal, itertools.cycle([1.3, 0.8]))
    with pytest.warns(FunctionWarning, match="is random"):
        check_separate("reward", lambda index: VALUES[index] * next(factors), VALUES)


def test_a_function_that_mixes_samples():
    with pytest.raises(InvalidInputError, match="mixes samples"):
        check_separate("reward", lambda index: VALUES[index] - VALUES[index].mean(), VALUES - VALUES.mean())
