"""Run a kernel on a potential that stays as it is: plain sampling, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import check_integer, check_type
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.particles import checked_particles
from implicit_diffusion.potentials.energy import Energy, check_potential, energy_of
from implicit_diffusion.potentials.stacked import StackedPotential
from implicit_diffusion.samplers.draws import BLOCK, innermost, stacked_numbers
from implicit_diffusion.samplers.kernel import Info, Kernel, State, Step
from implicit_diffusion.samplers.resolution import check_resolved


def simulate(
    kernel: Kernel, potential: nn.Module, x: Float[Tensor, "n *event"], noise: Noise, steps: int
) -> Iterator[tuple[State, Info]]:
    """Yield the state and the diagnostics of every step of the kernel, starting at x.

        >>> import torch
        >>> from implicit_diffusion import ULA, GaussianMixture, Noise
        >>> from implicit_diffusion.samplers import simulate
        >>> potential = GaussianMixture(torch.zeros(1, 2))  # N(0, I)
        >>> for state, info in simulate(ULA(0.2), potential, torch.zeros(10_000, 2), Noise(0), 40):
        ...     pass
        >>> print(f"{state.x.var():.1f}")
        1.1

    Args:
        kernel: the sampler's step.
        potential: V, in evaluation mode while a step is made.
        x: X_0.
        noise: source of every random number; the same noise gives the same particles.
        steps: how many to make.

    Raises:
        InvalidInputError: a potential that cannot be sampled from; see `check_potential`.
    """
    check_type("kernel", kernel, Kernel, "use ULA(0.1), for example")
    check_type("noise", noise, Noise, "use Noise(0), for example")
    check_type("potential", potential, nn.Module, "it is a module from (n, *event) to (n,)")
    x, steps = checked_particles(x, 1), check_integer("steps", steps, 0)
    check_resolved(kernel, x, 0)
    with eval_mode(potential):
        check_potential(potential, x)
    state = kernel.start(x, noise.generator(0, device=x.device))
    count = max(1, BLOCK // x.numel())
    for k in range(steps):
        check_resolved(kernel, state.x, k)
        block, i = divmod(k, count)
        if i == 0:
            numbers = kernel.draws(noise.generator(1, block, device=x.device), count, x)
        draws, h = tuple(part[i] for part in numbers), x.new_tensor(kernel.step_size_at(k))
        with eval_mode(potential):
            here = energy_of(potential, state.x)
            step = Step(state.x, state.momentum, here, lambda y: energy_of(potential, y), draws, h)
            state, info = kernel.move(step)
        yield state, info


def simulate_together(
    kernel: Kernel,
    potentials: Sequence[nn.Module],
    x: Float[Tensor, "runs n *event"],
    noises: Sequence[Noise],
    steps: int,
) -> Iterator[Float[Tensor, "runs n *event"]]:
    """Yield the particles of several runs after every step: each run's are those of `simulate` to rounding.

    Args:
        kernel: the sampler's step, without momentum.
        potentials: V of every run: the same module with numbers of its own.
        x: X_0 of every run.
        noises: of every run.
        steps: how many to make.
    """
    runs, n = x.shape[:2]
    potential, count = StackedPotential(potentials), max(1, BLOCK // x[0].numel())

    def energy(y: Tensor) -> Energy:
        return Energy(*(part.flatten(0, 1) for part in energy_of(potential, y.unflatten(0, (runs, n)))))

    at = innermost(x.flatten(0, 1))
    with eval_mode(potential.model):
        for own, start in zip(potentials, x):
            check_potential(own, start)
    for k in range(steps):
        check_resolved(kernel, at, k)
        block, i = divmod(k, count)
        if i == 0:
            each = [kernel.draws(noise.generator(1, block, device=x.device), count, x[0]) for noise in noises]
            numbers = [stacked_numbers(parts).flatten(1, 2) for parts in zip(*each)]
        with eval_mode(potential.model):
            draws, h = tuple(part[i] for part in numbers), x.new_tensor(kernel.step_size_at(k))
            state, _ = kernel.move(Step(at, None, energy(at), energy, draws, h))
        at = innermost(state.x)
        yield at.unflatten(0, (runs, n))
