"""The checks of every call in the tests: what they refuse, and that the package has them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import beartype
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import implicit_diffusion as idf
from tests.helpers.checked_calls import ENOUGH, begin_test, checked

check = checked(typechecker=beartype.beartype)
Refused = TypeCheckError


@check
def outer(x: Float[Tensor, " n"], y: Float[Tensor, " m"], *, cut: int = 0) -> Float[Tensor, "n m"]:
    return (x[:, None] * y)[cut:]


@check
def dot(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    return (x @ y).item() if x.any() else "nothing"


@check
@dataclass
class Pair:
    x: Float[Tensor, " n"]
    y: Float[Tensor, " n"]


def test_a_name_has_one_size_in_a_call_and_in_its_result():
    one, two = torch.ones(1), torch.ones(2)
    assert outer(two, one).shape == (2, 1) and outer(one, two).shape == (1, 2) and dot(two, two) == 2.0
    assert Pair(one, one).x is one
    for call in (lambda: dot(one, two), lambda: outer(two, one, cut=1), lambda: Pair(one, two)):
        with pytest.raises(Refused):
            call()
    assert dot(one, one) == 1.0  # what was refused leaves no sizes behind


def test_types_are_checked_with_and_without_shapes(as_users_run, monkeypatch):
    calls = (
        lambda: dot(torch.zeros(1), torch.zeros(1)),
        lambda: outer(torch.ones(1), torch.ones(1), cut=None),
        lambda: idf.errors.check_integer(3, 1),
    )
    assert dot(torch.zeros(1), torch.zeros(1)) == "nothing"  # as users run it
    monkeypatch.undo()
    for call in calls:
        with pytest.raises(Refused):
            call()


@check
def total(numbers: list[float]) -> list[float]:
    return [sum(numbers), len(numbers)]


def test_the_first_calls_of_a_test_are_checked():
    begin_test()
    for _ in range(ENOUGH):
        with pytest.raises(Refused):
            total(["1"] * 3)
    with pytest.raises(TypeError, match="unsupported operand"):  # the sum's own
        total(["1"] * 3)
    begin_test()
    with pytest.raises(Refused):
        total(["1"] * 3)


def test_checks_draw_nothing_from_the_global_generator():
    begin_test()
    state, wrong = random.getstate(), 0
    for _ in range(ENOUGH):
        try:
            total([0.5, "2"])
        except Refused:
            wrong += 1
        except TypeError:  # the first was drawn, and the sum refuses the second
            pass
    assert random.getstate() == state
    assert 25 < wrong < 75  # either is drawn: half of a hundred, ± 5σ


def test_the_package_is_checked():
    from implicit_diffusion.samplers.rows import RowCoefficients

    assert idf.Noise.normal.is_checked and idf.Chain.transition.is_checked and RowCoefficients.__init__.is_checked
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'shape'"):
        idf.Noise(0).normal()
