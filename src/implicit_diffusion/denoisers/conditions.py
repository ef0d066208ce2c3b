"""Conditions of a chain: how they are drawn, embedded and amplified.

A sample's condition is a small integer, the number of its class or of its prompt. It is drawn by key (`Drawn`), turned
into embeddings in front of the network (`Embedded`: a row of a table that frozen text encoders have filled), and may be
amplified (`ClassifierFree`, Ho and Salimans, *Classifier-Free Diffusion Guidance*, arXiv 2207.12598):

    u_θ(x, t, c) + (w − 1)·(u_θ(x, t, c) − u_θ(x, t, ∅))

The last two are denoisers around a denoiser. Chain, adjoint and path KL see a guided text-conditional network as
u_θ(x, t, prompt), and differentiate through guidance as through any layer, with respect to θ and x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from implicit_diffusion.denoisers.embedding_table import EmbeddingTable
from implicit_diffusion.errors import InvalidInputError, check_number, check_tensor, check_type, shown
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import Shown, ShownModule, brief

ROW = 2**32 - 1  # key of the draws, in place of a row number, which is always smaller
NULL = "null_"  # begins the names of the buffers of `ClassifierFree`


@dataclass(frozen=True, repr=False)
class Drawn(Shown):
    """A condition of chains: every sample draws one of `values`, independently.

    Args:
        name: of the denoiser's argument, e.g. "class_labels".
        values: to draw from, with shape (m,).
        weights: ≥ 0, with shape (m,), in proportion to which they are drawn; None for all equally often.

    Raises:
        InvalidInputError: no values; weights that are negative, not finite, or all zero.
    """

    name: str
    values: Int[Tensor, " m"]
    weights: Float[Tensor, " m"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise InvalidInputError(f"name must be the name of an argument of the denoiser, got {shown(self.name)}")
        if isinstance(self.values, Tensor) and self.values.ndim and not len(self.values):
            raise InvalidInputError(f"condition: there are no values of {self.name} to draw from; give at least one")
        check_tensor("values", self.values, "m", integers=True)
        if self.weights is not None:
            check_tensor("weights", self.weights, "m")
            if len(self.weights) != len(self.values) or not (self.weights >= 0).all() or not self.weights.sum() > 0:
                raise InvalidInputError(
                    f"weights must be {len(self.values)} numbers ≥ 0, one for each of the values, and not all 0, got "
                    f"{shown(self.weights)}"
                )

    def __call__(self, noise: Noise, batch: int, index: int) -> dict[str, Int[Tensor, " batch"]]:
        """The values of trajectory `index`; the same arguments give the same values."""
        generator = noise.generator(index, ROW)
        if self.weights is None:
            which = torch.randint(len(self.values), (batch,), generator=generator)
        else:
            which = torch.multinomial(self.weights.double().cpu(), batch, replacement=True, generator=generator)
        return {self.name: self.values[which]}


class Embedded(ShownModule):
    """u(x, t, prompt) = u(x, t, **row `prompt` of a table).

    Copies of the module share the table. It is not part of the module's state, because it can be computed again from
    the prompts.

    Args:
        denoiser: called with x, t and, for every column, one row per sample.
        table: columns by name, with shape (m, ...), on any device: it, or the rows of a batch, are copied to that of x.
        name: of the argument that holds the number of the row.

    Raises:
        InvalidInputError: no columns, or columns of different lengths.
    """

    def __init__(self, denoiser: nn.Module, table: Mapping[str, Float[Tensor, "m ..."]], name: str = "prompt") -> None:
        super().__init__()
        check_type("denoiser", denoiser, nn.Module, "it is called as u(x, t, **columns)")
        if not isinstance(name, str):
            raise InvalidInputError(f"name must be that of a row's number in a condition, got {shown(name)}")
        self.denoiser, self.name = denoiser, name
        self.table = table if isinstance(table, EmbeddingTable) else EmbeddingTable(table)

    def _words(self) -> Iterable[str]:
        return brief(self.denoiser), f"table={brief(self.table)}", f"name={self.name!r}"

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Any
    ) -> Float[Tensor, "batch *event"]:
        """u(x, t), where `condition` holds the row's number under `name`; its other entries are passed on."""
        if self.name not in condition:
            raise InvalidInputError(
                f"the condition must have {self.name}, the row of the table; it has {', '.join(condition) or 'none'}"
            )
        which = condition.pop(self.name)
        return self.denoiser(x, t, **self.table.of(which, x), **condition)


class ClassifierFree(ShownModule):
    """Classifier-free guidance: u(x, t, c) + (w − 1)(u(x, t, c) − u(x, t, ∅)), in one call on twice the batch.

    Args:
        denoiser: called with x, t and the condition.
        scale: w; 1 gives the conditional network, 0 the unconditional one.
        null: the number that means no condition, by name of the condition; or, in a tensor with shape (m,), what each
            of its m numbers is guided away from, such as the negative prompt of every prompt.

    Raises:
        InvalidInputError: a scale that is not finite, or an empty `null`.
    """

    def __init__(self, denoiser: nn.Module, scale: float, null: Mapping[str, int | Int[Tensor, " m"]]) -> None:
        super().__init__()
        check_type("denoiser", denoiser, nn.Module, "it is called as u(x, t, **condition)")
        named = isinstance(null, Mapping) and all(isinstance(v, int) or _numbers(v) for v in null.values())
        try:
            scale = check_number("guidance", scale)
        except InvalidInputError:
            named = False
        if not named or not null:
            raise InvalidInputError(
                f"guidance needs a finite scale, and in null the number that means no condition, e.g. "
                f"{{'class_labels': 10}}, got {shown(scale)} and {shown(null)}"
            )
        self.denoiser, self.scale, self._names = denoiser, scale, tuple(null)
        self._one = {name: number for name, number in null.items() if isinstance(number, int)}
        place = next((p.device for p in denoiser.parameters()), None)
        for name, numbers in null.items():
            if isinstance(numbers, Tensor):
                self.register_buffer(NULL + name, numbers.to(place), persistent=False)

    def _words(self) -> Iterable[str]:
        null = {name: self._one[name] if name in self._one else self._buffers[NULL + name] for name in self._names}
        return brief(self.denoiser), f"scale={self.scale:g}", f"null={brief(null)}"

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Tensor
    ) -> Float[Tensor, "batch *event"]:
        """The guided u(x, t, **condition).

        Raises:
            InvalidInputError: the condition lacks a name of `null`, so that both networks would be the same.
        """
        if not {*self._names} <= condition.keys():
            raise InvalidInputError(
                f"null holds {', '.join(self._names)}, but the condition {', '.join(condition) or 'nothing'}; guidance "
                "needs names of the condition"
            )
        if self.scale == 1:
            return self.denoiser(x, t, **condition)
        null = {k: self._null(k, v) if k in self._names else v for k, v in condition.items()}
        both = {k: torch.cat([null[k], v]) for k, v in condition.items()}
        without, given = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return without + self.scale * (given - without)

    def _null(self, name: str, value: Tensor) -> Tensor:
        if name in self._one:
            return torch.full_like(value, self._one[name])
        numbers = self.get_buffer(NULL + name)
        if numbers.device != value.device:  # a network that is shared out comes to its device without what is around it
            numbers = self._buffers[NULL + name] = numbers.to(value.device)
        return numbers[value].to(value.dtype)


def _numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point()
