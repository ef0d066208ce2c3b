"""Conditions of a chain: what is drawn for each sample, what the network is given for it, and how strongly it counts.

A sample's condition is a small integer, the number of its class or of its prompt. It is *drawn* by key (`Drawn`),
turned into embeddings inside the network (`Embedded`: one row of a table that the frozen text encoders filled once),
and may be amplified (`ClassifierFree`, Ho and Salimans, *Classifier-Free Diffusion Guidance*, arXiv 2207.12598):

    u_θ(x, t, c) + (w − 1)·(u_θ(x, t, c) − u_θ(x, t, ∅))

Each is a denoiser around a denoiser, so that a guided text-conditional network is u_θ(x, t, prompt) to the chain, its
adjoint and its path KL: guidance is differentiated through like any layer, both for θ and for x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_number, check_tensor, check_type, shown
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import Shown, ShownModule, brief

ROW = 2**32 - 1  # key of the draws, in the place of a row's: no chain has so many


@dataclass(frozen=True, repr=False)
class Drawn(Shown):
    """A condition of chains: every sample draws one of `values`, uniformly and on its own.

    Args:
        name: under which the denoiser takes it, e.g. "class_labels".
        values: to draw from, with shape (m,).

    Raises:
        InvalidInputError: no values.
    """

    name: str
    values: Int[Tensor, " m"]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise InvalidInputError(f"name must be that of an argument of the denoiser, got {shown(self.name)}")
        if isinstance(self.values, Tensor) and self.values.ndim and not len(self.values):
            raise InvalidInputError(f"condition: there are no values of {self.name} to draw from")
        check_tensor("values", self.values, "m", integers=True)

    def __call__(self, noise: Noise, batch: int, index: int) -> dict[str, Int[Tensor, " batch"]]:
        """The values of trajectory `index`; the same arguments draw the same ones."""
        which = torch.randint(len(self.values), (batch,), generator=noise.generator(index, ROW))
        return {self.name: self.values[which]}


class Embedded(ShownModule):
    """u(x, t, prompt) = u(x, t, **row `prompt` of a table).

    Copies of the module share the table, which is no part of its state: it can be filled again from the prompts.

    Args:
        denoiser: takes x, t and one row per sample of every column.
        table: columns by name, with shape (m, ...), on the network's device.
        name: under which the number of the row is given.

    Raises:
        InvalidInputError: no columns, or columns of different lengths.
    """

    def __init__(self, denoiser: nn.Module, table: Mapping[str, Float[Tensor, "m ..."]], name: str = "prompt") -> None:
        super().__init__()
        check_type("denoiser", denoiser, nn.Module, "it is called as u(x, t, **columns)")
        check_type("table", table, Mapping, "it holds columns by name")
        for column, value in table.items():
            check_tensor(f"column {column}", value, "m ...")
        if not isinstance(name, str):
            raise InvalidInputError(f"name must be the one that a condition gives a row's number, got {shown(name)}")
        lengths = {column: len(value) for column, value in table.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidInputError(f"table must have columns of one length, one row per {name}, got {lengths}")
        self.denoiser, self.name, self.table = denoiser, name, _Shared(table)

    def _words(self) -> Iterable[str]:
        return brief(self.denoiser), f"table={brief(self.table.columns)}", f"name={self.name!r}"

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Any
    ) -> Float[Tensor, "batch *event"]:
        """u(x, t), where `condition` holds the row's number under `name`; the rest of it goes on as it is."""
        if self.name not in condition:
            raise InvalidInputError(
                f"the condition must give {self.name}, the row of the table; it gives {', '.join(condition) or 'none'}"
            )
        which = condition.pop(self.name)
        rows = {column: value[which].to(x.dtype) for column, value in self.table.columns.items()}
        return self.denoiser(x, t, **rows, **condition)


@dataclass(frozen=True, eq=False)
class _Shared:
    """Columns that copies of a module hold in common."""

    columns: Mapping[str, Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class ClassifierFree(ShownModule):
    """Classifier-free guidance: u(x, t, c) + (w − 1)(u(x, t, c) − u(x, t, ∅)), in one call on twice the batch.

    Args:
        denoiser: takes x, t and the condition.
        scale: w; 1 is the plain conditional network, 0 the unconditional one.
        null: the values that stand for no condition, by name; names of the condition.

    Raises:
        InvalidInputError: a scale that is not finite, or nothing in `null`.
    """

    def __init__(self, denoiser: nn.Module, scale: float, null: Mapping[str, int]) -> None:
        super().__init__()
        check_type("denoiser", denoiser, nn.Module, "it is called as u(x, t, **condition)")
        named = isinstance(null, Mapping) and all(isinstance(v, int) for v in null.values())
        try:
            scale = check_number("guidance", scale)
        except InvalidInputError:
            named = False
        if not named or not null:
            raise InvalidInputError(
                f"guidance needs a finite scale and the value of no condition, got {shown(scale)} and {shown(null)}"
            )
        self.denoiser, self.scale, self.null = denoiser, scale, dict(null)

    def _words(self) -> Iterable[str]:
        return brief(self.denoiser), f"scale={self.scale:g}", f"null={brief(self.null)}"

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Tensor
    ) -> Float[Tensor, "batch *event"]:
        """The guided u(x, t, **condition).

        Raises:
            InvalidInputError: the condition lacks a name of `null`: what is guided away from would be the same network.
        """
        if not self.null.keys() <= condition.keys():
            raise InvalidInputError(
                f"null holds {', '.join(self.null)}, but the condition {', '.join(condition) or 'nothing'}; guidance "
                "needs names of the condition"
            )
        if self.scale == 1:
            return self.denoiser(x, t, **condition)
        null = {k: torch.full_like(v, self.null[k]) if k in self.null else v for k, v in condition.items()}
        both = {k: torch.cat([null[k], v]) for k, v in condition.items()}
        without, given = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return without + self.scale * (given - without)
