"""Warm-up: find the step size at which a kernel accepts as often as it should.

Where nearly all proposals are accepted, or nearly none, h is doubled or halved at every step until that changes: the
search may start in other units than the potential's. A stochastic approximation of the root of
log h ↦ E[acceptance] − target follows (Robbins and Monro, 1951; Andrieu and Thoms, *A tutorial on adaptive MCMC*,
2008): log h moves by (acceptance − target)·k^{−1/2}, and its average over the second half is kept (Polyak and Ruppert).
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError, check_integer, check_number, check_type
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.particles import checked_particles
from implicit_diffusion.potentials.energy import check_potential, coarse, energy_of, precision
from implicit_diffusion.samplers.kernel import Kernel, State

K = TypeVar("K", bound=Kernel)
DOUBLINGS = 100  # of the step size or of its inverse, at most
MISSED = 0.1  # of the target, in acceptance, that is worth a warning


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
        kernel: MALA or HMC; its step size, a number, is where the search starts.
        potential: V under the θ to tune at.
        x: particles; the acceptance is averaged over them.
        noise: of the warm-up alone.
        steps: of the approximation, which follows as many doublings as are needed.
        target: acceptance to aim at; by default the kernel's own, 0.574 for MALA (optimal scaling, Roberts and
            Rosenthal, 1998) and 0.8 for HMC.

    Raises:
        InvalidInputError: a kernel that never rejects, or whose step size is a schedule; fewer than 20 steps; a target
            outside (0, 1); a potential that `check_potential` refuses.
        NonFiniteError: V became infinite at some of the particles.

    It warns where the target is not met.
    """
    check_type("kernel", kernel, Kernel, "use MALA(0.1), for example")
    check_type("noise", noise, Noise, "use Noise(0), for example")
    check_type("potential", potential, nn.Module, "it is a module from (n, *event) to (n,)")
    target = kernel.target_acceptance if target is None else target
    if kernel.target_acceptance is None or target is None:
        raise InvalidInputError(
            f"{type(kernel).__name__} never rejects, so its step size cannot be tuned to an acceptance; use MALA or HMC"
        )
    if callable(kernel.step_size):
        raise InvalidInputError(
            "step_size is a function of the iteration, and warm-up finds a number; warm up a kernel with a number, and "
            "scale the schedule by what it finds"
        )
    steps, target, x = check_integer("steps", steps, 20), check_number("target", target, 0.0, 1.0), checked_particles(x)

    def step(x: Tensor, log_h: float, *key: int) -> tuple[State, float]:
        generator, h = noise.generator(*key, device=x.device), x.new_tensor(math.exp(log_h))
        state, info = kernel.move(kernel.prepare(potential, State(x), generator)._replace(h=h))
        assert info.acceptance is not None
        return state, info.acceptance.nan_to_num(0.0).mean().item()

    log_h, kept, few, many = math.log(kernel.step_size_at(0)), [], target / 2, (1 + target) / 2
    with eval_mode(potential):
        check_potential(potential, x)
        if warning := coarse(energy_of(potential, x).value, precision(potential, x)):
            warnings.warn(warning, stacklevel=2)
        state, acceptance = step(x, log_h, 0, 0)
        up = acceptance > many
        for doublings in range(1, DOUBLINGS + 1):
            if not (acceptance > many if up else acceptance < few):
                break
            x, log_h = state.x, log_h + (math.log(2) if up else -math.log(2))
            state, acceptance = step(x, log_h, 0, doublings)
        for k in range(steps):
            state, acceptance = step(x, log_h, k)
            x = state.x
            log_h += (acceptance - target) / math.sqrt(k / 10 + 1)
            if 2 * k >= steps:
                kept.append((log_h, acceptance))
    if state.value is None or not state.value.isfinite().all():  # NaN is never accepted, −∞ always
        raise NonFiniteError("warm-up: V is infinite at some of the particles; check that it is bounded below")
    tuned = copy.copy(kernel)
    tuned.step_size = math.exp(sum(h for h, _ in kept) / len(kept))
    reached = sum(acceptance for _, acceptance in kept) / len(kept)
    if abs(reached - target) > MISSED:
        warnings.warn(
            f"warm-up did not reach its target: {reached:.0%} of the proposals were accepted on the way to the step "
            f"size {tuned.step_size:.3g}, not {target:.0%}; use more steps, start closer, or check that the potential "
            "confines the particles",
            stacklevel=2,
        )
    return tuned, x
