"""Run a kernel on a potential that stays as it is: plain sampling, without training."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import check_integer, check_type
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.particles import states
from implicit_diffusion.potentials.energy import check_potential, energy_of
from implicit_diffusion.samplers.kernel import BLOCK, Kernel, Move, check_resolved


def simulate(
    kernel: Kernel, potential: nn.Module, x: Float[Tensor, "n *event"], noise: Noise, steps: int
) -> Iterator[Move]:
    """Yield every step of the kernel from x on; `move.x` are the particles.

    Args:
        kernel: the sampler's step.
        potential: V, in evaluation mode while a step is made.
        x: X_0.
        noise: of the run; the same noise gives the same particles.
        steps: how many.

    Raises:
        InvalidInputError: a potential that cannot be sampled from; see `check_potential`.
    """
    check_type("kernel", kernel, Kernel, "take ULA(0.1), say")
    check_type("noise", noise, Noise, "take Noise(0), say")
    check_type("potential", potential, nn.Module, "it is a module from (n, *event) to (n,)")
    x, steps = states(x, 1), check_integer("steps", steps, 0)
    check_resolved(kernel, x, 0)
    with eval_mode(potential):
        check_potential(potential, x)
    momentum = kernel.momentum(noise.generator(0, device=x.device), x)
    count = max(1, BLOCK // x.numel())
    for k in range(steps):
        check_resolved(kernel, x, k)
        block, i = divmod(k, count)
        if i == 0:
            drawn = kernel.draws(noise.generator(1, block, device=x.device), count, x)
        with eval_mode(potential):
            here = energy_of(potential, x)
            draws = tuple(numbers[i] for numbers in drawn)
            move = kernel.move(
                x, momentum, here, lambda y: energy_of(potential, y), draws, x.new_tensor(kernel.step(k))
            )
        x, momentum = move.x, move.momentum
        yield move
