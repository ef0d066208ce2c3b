"""Warm-up: find the step size at which a kernel accepts as often as it should.

A stochastic approximation of the root of log h ↦ E[acceptance] − target (Robbins and Monro, 1951; Andrieu and Thoms,
*A tutorial on adaptive MCMC*, 2008): log h moves by (acceptance − target)·k^{−1/2}, and its average over the second
half is kept (Polyak and Ruppert).
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError, check_type
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials.energy import check_potential, energy_of
from implicit_diffusion.samplers.kernel import Kernel

K = TypeVar("K", bound=Kernel)


def warm_up(
    kernel: K,
    potential: nn.Module,
    x: Float[Tensor, "n *event"],
    noise: Noise,
    *,
    steps: int = 200,
    target: float | None = None,
) -> tuple[K, Float[Tensor, "n *event"]]:
    """The same kernel with a tuned step size, and the particles where the warm-up left them.

    Args:
        kernel: MALA or HMC; its step size, a number, is where the search begins.
        potential: V under the θ to tune at.
        x: particles; the acceptance is averaged over them.
        noise: of the warm-up alone.
        steps: of the search.
        target: acceptance to aim at; by default the kernel's own, 0.574 for MALA (optimal scaling, Roberts and
            Rosenthal, 1998) and 0.8 for HMC.

    Raises:
        InvalidInputError: a kernel that never rejects, or whose step size is a schedule; fewer than 20 steps; a target
            outside (0, 1); from `check_potential`.
        NonFiniteError: V became infinite at some of the particles.
    """
    check_type("kernel", kernel, Kernel, "take MALA(0.1), say")
    check_type("noise", noise, Noise, "take Noise(0), say")
    target = kernel.target_acceptance if target is None else target
    if kernel.target_acceptance is None or target is None:
        raise InvalidInputError(
            f"{type(kernel).__name__} never rejects: there is no acceptance to tune its step size to"
        )
    if callable(kernel.step_size):
        raise InvalidInputError(
            "step_size is a function of the iteration, and warm-up finds a number; warm up a kernel with a number, and "
            "scale the schedule by what it finds"
        )
    if steps < 20:
        raise InvalidInputError(f"steps must be an integer ≥ 20, got {steps}")
    if not 0 < target < 1:
        raise InvalidInputError(f"target must lie in (0, 1), got {target}")
    log_h, kept = math.log(kernel.step(0)), []
    with eval_mode(potential):
        check_potential(potential, x)
        for k in range(steps):
            draws = tuple(d[0] for d in kernel.draws(noise.generator(k, device=x.device), 1, x))
            h = x.new_tensor(math.exp(log_h))
            move = kernel.move(x, None, energy_of(potential, x), lambda y: energy_of(potential, y), draws, h)
            assert move.acceptance is not None
            x = move.x
            acceptance = move.acceptance.nan_to_num(0.0).mean().item()
            log_h += (acceptance - target) / math.sqrt(k / 10 + 1)
            if 2 * k >= steps:
                kept.append(log_h)
    if move.energy is None or not move.energy.isfinite().all():  # NaN is never accepted, −∞ always
        raise NonFiniteError("warm-up: V is infinite at some of the particles; check that it is bounded below")
    tuned = copy.copy(kernel)
    tuned.step_size = math.exp(sum(kept) / len(kept))
    return tuned, x
