"""The table validates, survives JSON bit for bit, and names its rows without noise."""

import json
import math

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.tables.table import COLUMNS, ChainTable


def make(**changes):
    columns = {column: torch.rand(5, dtype=torch.float64) + 0.1 for column in COLUMNS}
    return ChainTable(**{**columns, "initial_std": 1.5, "name": "test", **changes})


def test_round_trip_through_json_is_exact():
    table = make()
    again = ChainTable.from_dict(json.loads(json.dumps(table.to_dict())))
    for column in COLUMNS:
        assert torch.equal(getattr(table, column), getattr(again, column))
    assert (again.initial_std, again.name, len(again)) == (1.5, "test", 5)


def test_columns_become_float64_and_belong_to_the_table():
    a = torch.ones(5)
    table = make(a=a, b=torch.arange(5))
    a.zero_()
    assert table.a.dtype == table.b.dtype == torch.float64
    assert torch.equal(table.a, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_coefficients_must_be_finite(column, bad):
    with pytest.raises(InvalidInputError, match=rf"{column}\[3\]"):
        make(**{column: torch.tensor([0.1, 0.2, 0.3, bad, 0.5])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": torch.ones(4)}, r"column b has shape \(4,\)"),
        ({"t": torch.ones(5, 1)}, "column t"),
        ({column: torch.ones(0) for column in COLUMNS}, "N ≥ 1"),
        ({"s": -torch.ones(5)}, "s must be ≥ 0"),
        ({"h": torch.zeros(5)}, "h must be > 0"),
        ({"initial_std": 0.0}, "initial_std"),
        ({"initial_std": math.nan}, "initial_std"),
    ],
)
def test_what_is_no_table_is_refused(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        make(**changes)


def test_noiseless_rows_are_those_with_s_small_against_b():
    b = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    s = torch.tensor([1e-10, 1e-4, 1e-4, 0.0, 1e-4], dtype=torch.float64)
    table = make(b=b, s=s)
    assert table.noiseless() == (0, 1, 3, 4)
    assert table.noiseless(tolerance=1e-9) == (0, 3)


def test_from_dict_names_wrong_keys():
    saved = make().to_dict()
    saved["c"] = saved.pop("b")
    with pytest.raises(InvalidInputError, match=r"missing keys \['b'\], unknown keys \['c'\]"):
        ChainTable.from_dict(saved)


def test_unscaled_is_the_same_sampler_in_the_networks_scale():
    """One roll-out in both scales: z_k = m_k x_k all the way, and the same x_N."""
    draws = torch.Generator().manual_seed(0)
    columns = {name: 0.5 + torch.rand(5, generator=draws, dtype=torch.float64) for name in "abshmt"}
    table = ChainTable(**columns, initial_std=3.0)
    plain = table.unscaled()
    assert (plain.m == 1).all()
    x = torch.randn(4, generator=draws, dtype=torch.float64)
    z = plain.initial_std * x
    x = table.initial_std * x
    for k in range(5):
        torch.testing.assert_close(z, table.m[k] * x)
        xi = torch.randn(4, generator=draws, dtype=torch.float64)
        u = torch.sin(table.m[k] * x + table.t[k])
        x = table.a[k] * x + table.b[k] * u + table.s[k] * xi
        z = plain.a[k] * z + plain.b[k] * u + plain.s[k] * xi
    torch.testing.assert_close(z, x)
