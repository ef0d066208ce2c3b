"""The checks of arguments: what each takes, and in which words it refuses the rest."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from implicit_diffusion.errors import (
    InvalidInputError,
    MemoryLimitError,
    NonFiniteError,
    check_call,
    check_choice,
    check_integer,
    check_number,
    check_tensor,
    memory_for,
    trying,
)

pytestmark = pytest.mark.usefixtures("as_users_run")
X = torch.zeros(3, 2)


class Pair(nn.Module):
    def forward(self, x, t):
        return x


def test_numbers_of_any_library_become_python_s_own():
    for value in (3, np.int64(3), torch.tensor(3)):
        assert type(check_integer("n", value)) is int and check_integer("n", value) == 3
    for value in (0.5, np.float32(0.5), torch.tensor(0.5)):
        assert type(check_number("x", value)) is float and check_number("x", value) == 0.5
    assert check_number("x", 0, 0, 1, closed=True) == 0.0


REFUSED = {
    "n must be an integer ≥ 1, got 0": lambda: check_integer("n", 0),
    "n must be an integer ≥ 1, got True": lambda: check_integer("n", True),
    "n must be an integer ≥ 1, got 2.0": lambda: check_integer("n", 2.0),
    "n must be an integer ≥ 1 or None, got '2'": lambda: check_integer("n", "2", note=" or None"),
    r"n must be an integer ≥ 1, got torch.int64 with shape \(2,\)": lambda: check_integer("n", torch.ones(2).long()),
    "n must be an integer ≥ 1, got the class int": lambda: check_integer("n", int),
    "n must lie in 1..4, got 5": lambda: check_integer("n", 5, 1, 4),
    "n must lie in 1..2147483647, got 1180591620717411303424": lambda: check_integer("n", 2**70),
    "x must be positive and finite, got nan": lambda: check_number("x", math.nan, 0),
    "x must be positive and finite, got 0": lambda: check_number("x", 0, 0),
    "x must be positive and finite, got inf": lambda: check_number("x", math.inf, 0),
    "x must be ≥ 0 and finite, got -1": lambda: check_number("x", -1, 0, closed=True),
    r"x must lie in \(0, 1\) or None, got 1": lambda: check_number("x", 1, 0, 1, note=" or None"),
    "x must be finite, got '1'": lambda: check_number("x", "1"),
    "x must be finite, got True": lambda: check_number("x", True),
    "x must be finite, got list": lambda: check_number("x", [1]),
    r"x must be finite, got torch.float32 with shape \(3, 2\)": lambda: check_number("x", X),
    "x must be of type Tensor, got list; use torch.as_tensor": lambda: check_tensor("x", [1.0], "n"),
    r"x must be a tensor of floating-point .*\(n, \*event\).*got torch.float32 with shape \(3,\)": lambda: check_tensor(
        "x", X[:, 0], "n *event"
    ),
    "floating-point numbers .*got torch.int64": lambda: check_tensor("x", X.long(), "n *event"),
    "of integers .*got torch.float32": lambda: check_tensor("x", X, "n d", integers=True),
    r"got torch.float32 with shape \(0, 2\)": lambda: check_tensor("x", X[:0], "n *event"),
    "on the meta device": lambda: check_tensor("x", X.to("meta"), "n d", finite=True),
    "in the layout torch.sparse_coo": lambda: check_tensor("x", X.to_sparse(), "n d"),
    "x must be finite floating-point numbers, but hold NaN": lambda: check_tensor("x", X / 0, "n d", finite=True),
    "f must be a function that is called with x and t, got the class Pair": lambda: check_call("f", Pair, "x", "t"),
    "f must be a function that is called with x and t, got 3": lambda: check_call("f", 3, "x", "t"),
    "got one that is not: too many positional": lambda: check_call("f", lambda x: x, "x", "t"),
    "got one that is not: missing a required argument: 't'": lambda: check_call("f", Pair(), "x"),
    "order must be one of a, b, got 'c'": lambda: check_choice("order", "c", ("a", "b")),
    r"order must be one of a, b, got list": lambda: check_choice("order", ["a"], ("a", "b")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_everything_else_is_refused_by_name(message):
    with pytest.raises(InvalidInputError, match=message):
        REFUSED[message]()


def test_calls_that_fit():
    for function in (lambda x, t: x, lambda *a: a, lambda x, t=0: x, Pair(), torch.add, max):
        check_call("f", function, "x", "t")


def test_what_a_function_of_the_user_raises_is_blamed_on_it():
    match = r"f fails on x of shape \(3, 2\): KeyError: 'a'"
    with pytest.raises(InvalidInputError, match=match) as caught, trying("f", "x of shape (3, 2)"):
        {}["a"]
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(NonFiniteError), trying("f", "x"):  # ours say what they mean already
        raise NonFiniteError("mine")


def test_what_no_memory_holds():
    with pytest.raises(MemoryLimitError, match="particles do not fit into memory"), memory_for("particles"):
        torch.empty(2**60, 2**3)
    with pytest.raises(MemoryLimitError), memory_for("particles"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes"), memory_for("particles"):
        X @ X
