"""Replayable noise: a key names its numbers, so that a forward and a backward pass share one path.

Nothing here advances: `noise.normal(shape, trajectory, step)` returns the same ξ whenever, wherever and in whatever
order it is asked for. Keys are hashed to seeds by NumPy's `SeedSequence`, because generators seeded with neighbouring
integers need not be independent, and a torch CPU generator keeps only the low 32 bits of its seed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError


@dataclass(frozen=True)
class Noise:
    """Standard normal numbers addressed by integer keys.

    Args:
        seed: any integer ≥ 0.
        prefix: the stream's own key; see `stream`.

    Raises:
        InvalidInputError: a seed or key that is negative or no integer.
    """

    seed: int
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = (self.seed, *self.prefix)
        try:
            seed, *prefix = map(operator.index, given)  # NumPy's integers become Python's, which a state can hold
        except TypeError as error:
            raise InvalidInputError(f"seed and keys must be integers ≥ 0, got {given}") from error
        if min((seed, *prefix)) < 0:
            raise InvalidInputError(f"seed and keys must be integers ≥ 0, got {given}")
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "prefix", tuple(prefix))

    def stream(self, *key: int) -> Noise:
        """An independent family of noise: `noise.stream(1)` never meets a key of `noise` that is one shorter."""
        return Noise(self.seed, self.prefix + key)

    def generator(self, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator on `device`, seeded by the hashed key."""
        words = np.random.SeedSequence(self.seed, spawn_key=self.prefix + key).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(words[0]))

    def normal(
        self,
        shape: tuple[int, ...],
        *key: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Independent N(0, 1) numbers of the given shape: the same key gives the same numbers on the same machine."""
        generator = self.generator(*key, device=device)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
