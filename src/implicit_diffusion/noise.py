"""Replayable noise: numbers are addressed by keys, so that a forward and a backward pass see the same path.

There is no state: `noise.normal(shape, trajectory, step)` always returns the same ξ, in whatever order keys are used.
Keys are hashed to seeds by NumPy's `SeedSequence`, because generators seeded with neighbouring integers need not be
independent, and a torch CPU generator keeps only the low 32 bits of its seed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_integer, memory_for, shown


@dataclass(frozen=True)
class Noise:
    """Standard normal numbers addressed by integer keys.

    Args:
        seed: any integer ≥ 0.
        prefix: the stream's own key; see `stream`.

    Raises:
        InvalidInputError: a seed or key is negative or not an integer.
    """

    seed: int
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = (self.seed, *self.prefix) if isinstance(self.prefix, Sequence) else (self.seed, self.prefix)
        try:
            seed, *prefix = map(operator.index, given)  # NumPy's integers become Python's, which a state can hold
        except (TypeError, ValueError, RuntimeError) as error:  # tensors raise various errors
            raise InvalidInputError(f"seed and keys must be integers ≥ 0, got {_in_short(given)}") from error
        if min((seed, *prefix)) < 0 or not isinstance(self.prefix, Sequence):
            raise InvalidInputError(f"seed and keys must be integers ≥ 0, got {_in_short(given)}")
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "prefix", tuple(prefix))

    def stream(self, *key: int) -> Noise:
        """Independent noise: no key of `noise.stream(1)` is equal to a shorter key of `noise`."""
        return Noise(self.seed, self.prefix + key)

    def generator(self, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator on `device`, seeded by the hashed key.

        Raises:
            InvalidInputError: a key is negative or not an integer; the device does not exist or draws no numbers.
        """
        stream = self.stream(*key)
        words = np.random.SeedSequence(stream.seed, spawn_key=stream.prefix).generate_state(1, np.uint64)
        try:
            return torch.Generator(device).manual_seed(int(words[0]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(f"device {shown(device)} draws no random numbers; use cpu or cuda") from error

    def normal(
        self,
        shape: tuple[int, ...],
        *key: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Independent N(0, 1) numbers of the given shape: the same key gives the same numbers on the same machine.

        Raises:
            InvalidInputError: as `generator`; a size is negative or not an integer; the dtype is not a floating-point
                type.
            MemoryLimitError: more numbers than the device can hold.
        """
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise InvalidInputError(f"shape must hold sizes, e.g. (2, 3), got {shown(shape)}")
        sizes = [check_integer("a size in shape", size, 0) for size in shape]
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InvalidInputError(f"dtype must be one of torch's floating-point types, got {shown(dtype)}")
        generator = self.generator(*key, device=device)
        with memory_for(f"{' × '.join(map(str, sizes))} random numbers"):
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)


def _in_short(given: tuple[object, ...]) -> str:
    return f"({', '.join(map(shown, given))}{',' * (len(given) == 1)})"
