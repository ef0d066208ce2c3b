"""Random numbers of the samplers: drawn for many steps at once, laid out for short vectors, addressed by iteration.

Random numbers are drawn outside of what may be compiled, for a block of iterations at once. Blocks, or short spans of
them, are addressed by number, so that a loop that is restored from disk draws the same. Where processes share the
particles, each draws the numbers of all, and keeps those of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.noise import Noise

Draw = Callable[[torch.Generator, int, Tensor], tuple[Tensor, ...]]  # `Kernel.draws`

BLOCK = 2**17  # numbers drawn at once: those of several steps of few particles, or of one step of many
SPAN = 32  # iterations, approximately, that one generator serves: seeding it costs as much as thousands of numbers


def has_short_vectors(x: Tensor) -> bool:
    """Whether x holds vectors so short that loops over their coordinates do not vectorise."""
    return x.ndim == 2 and x.shape[1] <= 16


def innermost(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers; short vectors are laid out with the particles innermost, which does vectorise."""
    return x.mT.contiguous().mT if has_short_vectors(x) else x.contiguous()


def normals(generator: torch.Generator, count: int, x: Tensor) -> Tensor:
    """N(0, 1) with shape (count, *x.shape), for short vectors with the particles innermost.

    The numbers depend on the shape of x alone, not on its layout in memory: a resumed run draws the same.
    """
    if has_short_vectors(x):
        shape = (count, x.shape[1], x.shape[0])
        return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype).mT
    return torch.randn((count, *x.shape), generator=generator, device=x.device, dtype=x.dtype)


def stacked_numbers(parts: Sequence[Tensor]) -> Tensor:
    """Numbers with shape (count, n, *event) of all runs as (count, runs, n, *event), laid out as the particles are."""
    if parts[0].ndim == 3 and has_short_vectors(parts[0][0]):
        return torch.stack([part.mT for part in parts], 2).permute(0, 2, 3, 1)
    return torch.stack(list(parts), 1)


def own_numbers(draw: Draw, generator: torch.Generator, count: int, x: Tensor) -> tuple[Tensor, ...]:
    """What `draw` returns for all the particles, of which x are this process's own; their rows of it, where it has any.

    A tensor with shape (count, n, …) has rows for n particles; any other shape has numbers for all of them alike.
    """
    n = len(x) * processes.count()
    if n == len(x):
        return draw(generator, count, x)
    numbers = draw(generator, count, x[:1].expand(n, *x.shape[1:]))
    own = [processes.share(part, 1) if part.ndim > 1 and part.shape[1] == n else part for part in numbers]
    lay = (lambda part: part.mT.contiguous().mT) if has_short_vectors(x) else Tensor.contiguous
    return tuple(lay(part) if part.ndim > 2 else part.contiguous() for part in own)


class Blocks:
    """The random numbers of every iteration of a loop, drawn block by block.

    What is kept is the block that was drawn last, and the generator that draws the next one.

    Args:
        stream: of the noise that the numbers come from.
    """

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.forget()

    def forget(self) -> None:
        """Drop the block that was drawn last: for a loop that continues from another state or with other noise."""
        self._block = -1
        self._generator: torch.Generator | None = None
        self._numbers: tuple[Tensor, ...] = ()

    def at(self, iteration: int, draw: Draw, noise: Noise, x: Float[Tensor, "n *event"]) -> tuple[Tensor, ...]:
        """The random numbers of one iteration: the kernel's `draws`, then one U(0, 1) for resampling.

        Args:
            iteration: counted from 0.
            draw: the kernel's `draws`.
            noise: source of the numbers, of which the stream is used.
            x: particles of the same shape, dtype and device as those that will be moved.
        """
        block, i = self.place(iteration, x)
        return tuple(part[i] for part in self.numbers(block, draw, noise, x))

    def place(self, iteration: int, x: Float[Tensor, "n *event"]) -> tuple[int, int]:
        """The block of an iteration, and which of it."""
        return divmod(iteration, _per_block(x))

    def numbers(self, block: int, draw: Draw, noise: Noise, x: Float[Tensor, "n *event"]) -> tuple[Tensor, ...]:
        """The random numbers of a block, with the iterations as their first dimension; see `at`."""
        if self._block != block:
            self._next(block, _per_block(x), draw, noise, x)
        return self._numbers

    def _next(self, block: int, count: int, draw: Draw, noise: Noise, x: Tensor) -> None:
        length = max(1, SPAN // count)  # blocks in a span
        first, last, generator = block - block % length, self._block, self._generator
        self.forget()
        if block == first or last != block - 1:
            generator, last = noise.generator(self.stream, block // length, device=x.device), first - 1
        assert generator is not None
        for _ in range(last, block):  # a loop that begins within a span draws what came before, and drops it
            uniform = torch.rand(count, generator=generator, device=x.device, dtype=x.dtype)
            self._numbers = (*own_numbers(draw, generator, count, x), uniform)
        self._block, self._generator = block, generator


def _per_block(x: Tensor) -> int:
    """Iterations in a block."""
    return max(1, BLOCK // (x.numel() * processes.count()))
