"""A sampler as a table of numbers.

Every fixed-step sampler of a diffusion or flow model used here is one affine-Gaussian recursion on a network,

    x_{k+1} = a_k x_k + b_k u(m_k x_k, t_k) + s_k ξ_k,     k = 0..N−1,     x_0 ~ N(0, σ_0² I),  ξ_k ~ N(0, I),

and differs from the others only in its N rows (a, b, s, m, t). Whether u predicts noise, data, velocity or
score is absorbed by a and b, so that no code above this floor depends on it.

A table also holds σ_0 (`initial_std`), the sampler time h_k that a row covers (the
step of the differential equation where the table discretises one, 1/N where it was read off a scheduler), and
a name for reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_number, check_type, shown
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.showing import Shown

COLUMNS = ("a", "b", "s", "m", "t", "h")


@dataclass(frozen=True, eq=False, repr=False)
class ChainTable(Shown):
    """The rows of a chain, x_{k+1} = a_k x_k + b_k u(m_k x_k, t_k) + s_k ξ_k.

    Columns have shape (N,). Tensors of any dtype and device are accepted, and kept as float64 copies on the CPU.

    Attributes:
        a: factor of the state.
        b: factor of the network's output.
        s: standard deviation of the row's noise, ≥ 0.
        m: scaling of the state on its way into the network (1 except for the σ-parameterised Euler schedulers).
        t: time given to the network, in the network's own units.
        h: sampler time covered by the row, > 0.
        initial_std: σ_0 > 0 of the initial noise.
        name: one line for reports.

    Raises:
        InvalidInputError: a column is empty, of another length or not finite, some s_k < 0, some h_k ≤ 0 or
            σ_0 ≤ 0.
    """

    a: Tensor
    b: Tensor
    s: Tensor
    m: Tensor
    t: Tensor
    h: Tensor
    initial_std: float = 1.0
    name: str = "chain"

    def __post_init__(self) -> None:
        for column in COLUMNS:
            check_type(f"ChainTable: column {column}", getattr(self, column), Tensor, "use torch.as_tensor(column)")
            given: Tensor = getattr(self, column)
            if given.is_complex() or given.is_meta or given.layout != torch.strided:
                raise InvalidInputError(f"ChainTable: column {column} must hold real numbers, got {shown(given)}")
            values = given.detach().to("cpu", torch.float64, copy=True)
            object.__setattr__(self, column, values)
            if values.ndim != 1 or len(values) == 0 or len(values) != len(self.a):
                raise InvalidInputError(
                    f"ChainTable: column {column} has shape {tuple(values.shape)}, column a "
                    f"{tuple(self.a.shape)}; all columns must have one shape (N,) with N ≥ 1."
                )
            if not values.isfinite().all():
                row = int((~values.isfinite()).nonzero()[0])
                raise InvalidInputError(
                    f"ChainTable: {column}[{row}] = {values[row].item()}; coefficients must be finite."
                )
        if (self.s < 0).any():
            raise InvalidInputError(f"ChainTable: s must be ≥ 0, its smallest value is {self.s.min().item()}.")
        if (self.h <= 0).any():
            raise InvalidInputError(f"ChainTable: h must be > 0, its smallest value is {self.h.min().item()}.")
        object.__setattr__(self, "initial_std", check_number("ChainTable: initial_std", self.initial_std, 0))
        if not isinstance(self.name, str):
            raise InvalidInputError(f"ChainTable: name must be one line for reports, got {shown(self.name)}.")

    def _words(self) -> Iterable[str]:
        yield repr(self.name)
        yield f"N={len(self)}"
        yield from (f"{name}: {column[0]:.3g} → {column[-1]:.3g}" for name in "ts" for column in [getattr(self, name)])
        yield f"initial_std={self.initial_std:g}"

    def __len__(self) -> int:
        """Number N of rows, which is the number of network calls."""
        return len(self.a)

    def unscaled(self) -> ChainTable:
        """The same sampler in the network's own scale: z_k = m_k x_k, so that every m is 1, and z_N = x_N.

            z_{k+1} = m_{k+1} (a_k/m_k z_k + b_k u(z_k, t_k) + s_k ξ_k),     m_N = 1,     z_0 ~ N(0, (m_0 σ_0)² I)

        It turns the σ-parameterised Euler schedulers into DDIM and DDPM.
        """
        after = torch.cat([self.m[1:], torch.ones(1, dtype=torch.float64)])
        return replace(
            self,
            a=after / self.m * self.a,
            b=after * self.b,
            s=after * self.s,
            m=torch.ones_like(self.m),
            initial_std=float(self.m[0]) * self.initial_std,
        )

    def agrees_with(self, other: ChainTable, tolerance: float = 1e-3) -> bool:
        """Whether two tables are the same sampler up to rounding of float32 σ's: same N and times, and rows that differ
        by less than `tolerance` of the row's largest coefficient, in the network's own scale (`unscaled`).
        """
        check_type("other", other, ChainTable, "a table is compared with a table")
        tolerance = check_number("tolerance", tolerance, 0, closed=True)
        if len(self) != len(other) or not torch.equal(self.t, other.t):
            return False
        one, two = (
            torch.stack([table.a, table.b, table.s, torch.full_like(table.a, table.initial_std)])
            for table in (self.unscaled(), other.unscaled())
        )
        return bool(((one - two).abs().amax(0) <= tolerance * one.abs().amax(0)).all())

    def noiseless(self, tolerance: float = 1e-4, *, among: Iterable[int] | None = None) -> tuple[int, ...]:
        """Rows, of all or among some, whose noise is too small to carry a path KL: s_k ≤ tolerance · |b_k|.

        The path KL weighs a change δ of the network's output by (b_k δ)²/(2 s_k²), which on these rows is at
        least δ²/(2 tolerance²) nats: infinite for deterministic rows, useless for DDPM's last (s = 1e−10).
        """
        tolerance = check_number("tolerance", tolerance, 0, closed=True)
        rows = (self.s <= tolerance * self.b.abs()).nonzero().flatten().tolist()
        return tuple(rows if among is None else sorted({*rows} & {*among}))

    def check_noise(self, rows: Iterable[int], wanting: str, otherwise: str) -> None:
        """Raise `InvalidInputError` where one of these rows has (nearly) no noise; the message names it.

        Args:
            rows: that are trained.
            wanting: what lacks the noise, which begins the message.
            otherwise: one more way out, which ends it.
        """
        bad = self.noiseless(among=rows)
        if not bad:
            return
        row = bad[-1]
        which = f"row {row}" if len(bad) == 1 else f"{len(bad)} rows, among them row {row},"
        raise InvalidInputError(
            f"{wanting}: {which} of the {len(self)} rows of {self.name} has s = {self.s[row]:.1e} beside b = "
            f"{self.b[row]:.1e}. Choose a chain with noise on all its rows (a reverse SDE, or DDPM with "
            "variance_type='fixed_large'); or keep the pretrained network there, pretrained_rows='noiseless'; or, "
            f"{otherwise}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The table as lists, numbers and a string; JSON keeps it bit for bit."""
        return {
            **{column: getattr(self, column).tolist() for column in COLUMNS},
            "initial_std": self.initial_std,
            "name": self.name,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ChainTable:
        """Inverse of `to_dict`.

        Raises:
            InvalidInputError: keys are missing or unknown, or the values are not those of a table.
        """
        expected = {field.name for field in fields(cls)}
        if not isinstance(saved, Mapping) or set(saved) != expected:
            keys = set(saved) if isinstance(saved, Mapping) else set()
            raise InvalidInputError(
                f"ChainTable.from_dict: missing keys {sorted(expected - keys)}, "
                f"unknown keys {sorted(map(str, keys - expected))}; use the dict that to_dict() returned."
            )
        try:
            columns = {column: torch.tensor(saved[column], dtype=torch.float64) for column in COLUMNS}
            initial_std = float(saved["initial_std"])
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidInputError(f"ChainTable.from_dict: {one_line(error)}; columns hold numbers.") from error
        return cls(**columns, initial_std=initial_std, name=str(saved["name"]))
