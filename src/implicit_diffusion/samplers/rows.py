"""The rows of a chain's table as tensors on its device, for slots that each stand on a row of their own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.table import ChainTable


@dataclass(frozen=True, repr=False)
class RowCoefficients(Shown):
    """What the rows of some slots are.

    Args:
        a, b, s, h, m: the rows' coefficients, with shape (slots, 1, ...) that broadcasts to states.
        t: the network's times.
        trained: whether u_θ acts on the row, shaped as `a`.
        pretrained_slots: the slots on pretrained rows.
        trained_slots: the other slots.
        order: puts the concatenation of these two in the order of the slots; empty where it is in order already.
    """

    a: Float[Tensor, "slots ..."]
    b: Float[Tensor, "slots ..."]
    s: Float[Tensor, "slots ..."]
    h: Float[Tensor, "slots ..."]
    m: Float[Tensor, "slots ..."]
    t: Float[Tensor, " slots"]
    trained: Bool[Tensor, "slots ..."]
    pretrained_slots: Int[Tensor, " pretrained"]
    trained_slots: Int[Tensor, " trained"]
    order: Int[Tensor, " order"]


@dataclass(repr=False)
class RowCache(Shown):
    """The coefficients of the combinations of rows that were read last: an index by a list would be copied to the
    device at every call.

    It holds 8N combinations. A queue meets at most 4N while it fills and drains, and a trajectory by itself meets N;
    where every trajectory is pulled back over a random number of rows, there is no end of them.

    Args:
        table: the chain's.
        pretrained_rows: rows on which u_0 acts.
        dims: of a state, without slots.
        device: of the states.
        dtype: of the states.
    """

    table: ChainTable
    pretrained_rows: Collection[int]
    dims: int
    device: torch.device
    dtype: torch.dtype
    _known: dict[tuple[int, ...], RowCoefficients] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, rows: tuple[int, ...]) -> RowCoefficients:
        """Those of the given rows, one per slot."""
        if rows not in self._known:
            if len(self._known) >= 8 * len(self.table):
                del self._known[next(iter(self._known))]  # the oldest
            self._known[rows] = self._read(rows)
        return self._known[rows]

    def _read(self, rows: tuple[int, ...]) -> RowCoefficients:
        index = list(rows)
        c = {name: getattr(self.table, name)[index].to(self.device, self.dtype) for name in "abshmt"}
        c["trained"] = torch.tensor([row not in self.pretrained_rows for row in rows], device=self.device)
        shaped = {name: value if name == "t" else value.view(-1, *(1,) * self.dims) for name, value in c.items()}
        pretrained = [slot for slot, row in enumerate(rows) if row in self.pretrained_rows]
        trained = [slot for slot, row in enumerate(rows) if row not in self.pretrained_rows]
        order = sorted(range(len(rows)), key=(pretrained + trained).__getitem__)
        slots = {
            "pretrained_slots": pretrained,
            "trained_slots": trained,
            "order": [] if order == sorted(order) else order,
        }
        where = {name: torch.tensor(which, dtype=torch.long, device=self.device) for name, which in slots.items()}
        return RowCoefficients(**shaped, **where)
