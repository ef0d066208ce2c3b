"""Particles that carry weights while the potential under them moves.

For a path of potentials V_0, V_1, … fixed in advance, a kernel's step under V_k and the increment

    A_{k+1} = A_k + forward_k − backward_{k+1}        (see `Kernel`)

keep  E_{π_k} φ = E[φ(X_k) e^{A_k}]/E[e^{A_k}]  and  log Z_k = log Z_0 + log E e^{A_k}  exact at any step size
(Jarzynski, cond-mat/9610209; Neal, physics/9803008). When fewer than half of the particles are effective they are
resampled by their weights, systematically, and log E e^A is kept as a number.

Where processes share the particles, each has the rows of its own, and the log-weights of all: their increments are what
the processes exchange in every iteration, one number per particle, and the rows themselves where they are resampled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.draws import innermost
from implicit_diffusion.samplers.kernel import Kernel, State
from implicit_diffusion.showing import of_tuple


class WeightedState(NamedTuple):
    """Particles between two iterations, with what their next increment of weights needs.

    Args:
        x: positions, with shape (n, *event).
        momentum: as `x`; None for kernels without.
        log_weights: A of all particles, with shape (n,).
        log_z: log Z_θ less the log mean e^A of the present weights: what earlier resamplings have carried over.
        previous: where the last step came from, as `x`.
        forward_part: that of the last step's increment, with shape (n,), in the widest dtype.
        h: the last step's size.
        lag: by how many standard deviations weighted and unweighted means differed when the weights were last reset.
    """

    x: Tensor
    momentum: Tensor | None
    log_weights: Tensor
    log_z: Tensor
    previous: Tensor
    forward_part: Tensor
    h: Tensor
    lag: Tensor

    def __repr__(self) -> str:
        return of_tuple(self)


def exact_draws(state: State, value: Float[Tensor, " n"]) -> WeightedState:
    """Draws from π_θ before their first step: equal weights, which change with θ alone, by V_θ(x) − V_θ′(x).

    Args:
        state: the draws, and their momentum.
        value: V_θ there.
    """
    zeros = [value.new_zeros(()) for _ in range(3)]
    return WeightedState(
        state.x, state.momentum, torch.zeros_like(value), zeros[0], state.x.clone(), exact(value), *zeros[1:]
    )


ROWS = ("x", "momentum", "previous", "forward_part")  # of a state, one for each particle that the process has


def own_rows(whole: WeightedState) -> WeightedState:
    """The state with this process's rows, out of that of all particles."""
    if processes.count() == 1:
        return whole
    rows = {name: getattr(whole, name) for name in ROWS if getattr(whole, name) is not None}
    return whole._replace(**{name: innermost(processes.share(part)) for name, part in rows.items()})


def check_together(own: WeightedState) -> None:
    """Raise `InvalidInputError` where one process, on behalf of all, asks for particles that they share."""
    if len(own.x) * processes.count() != len(own.log_weights):
        raise InvalidInputError(
            "the particles of a loop are shared by several processes, and only one of them asks for all; read them in "
            "all processes, before what the main process does by itself"
        )


def all_rows(own: WeightedState) -> WeightedState:
    """The state of all particles, out of those with the processes' rows."""
    check_together(own)
    if processes.count() == 1:
        return own
    rows = {name: getattr(own, name) for name in ROWS if getattr(own, name) is not None}
    return own._replace(**{name: innermost(processes.gathered(part)) for name, part in rows.items()})


def reweighted(kernel: Kernel, state: WeightedState, here: Energy) -> WeightedState:
    """The weights under the θ of `here`, A ← A + forward − backward; `here` is V and ∇V at the particles."""
    backward = kernel.backward_part(state.previous, state.x, here, state.h)
    increment = processes.gathered(exact(state.forward_part) - exact(backward))
    log_weights = exact(state.log_weights) + increment
    return state._replace(log_weights=log_weights.to(state.log_weights.dtype))


def settled(state: WeightedState, value: Float[Tensor, " n"]) -> WeightedState:
    """Particles whose increment is complete, at V = `value`: what comes next is the change of θ where they stand."""
    return state._replace(previous=state.x, forward_part=exact(value), h=torch.zeros_like(state.h))


def log_mean_exp(log_weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Log (1/n) Σ_i e^{A_i}."""
    return (log_weights - log_weights.amax()).exp().mean().log() + log_weights.amax()


def effective(log_weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The effective sample size 1/Σ w², w = softmax A."""
    return 1 / torch.softmax(log_weights, 0).square().sum()


def exhausted(log_weights: Float[Tensor, " n"]) -> Tensor:
    """Whether the effective sample size is below n/2."""
    return effective(log_weights) < len(log_weights) / 2


@torch.no_grad()
def systematic(log_weights: Float[Tensor, " n"], uniform: Float[Tensor, ""]) -> Int[Tensor, " n"]:
    """Systematic resampling: n indices, index i about n w_i times, from a single U(0, 1) draw.

    The points (j + 1 − u)/n, j = 0..n−1, fall into the cells of the weights' cumulative sum (Kitagawa, 1996); every
    particle is chosen ⌊n w_i⌋ or ⌈n w_i⌉ times. Being in (0, 1], with cells closed to the right, they never fall on a
    particle without weight.
    """
    n = len(log_weights)
    edges = torch.softmax(log_weights, 0).cumsum(0)
    points = (torch.arange(n, device=edges.device, dtype=edges.dtype) + (1 - uniform)) / n
    return torch.searchsorted(edges / edges[-1], points).clamp(max=n - 1)


def resample(state: WeightedState, here: Energy, uniform: Float[Tensor, ""]) -> tuple[WeightedState, Energy]:
    """Where fewer than half of the particles are effective, resample them by their weights and update log Z.

    Free of branches in a single process, so that it compiles and no device is waited for. Several processes exchange
    rows where that is due, and read a number in order to know.

    Args:
        state: with weights under the present θ.
        here: V and ∇V at the particles.
        uniform: a draw from U(0, 1).
    """
    log_weights, n = state.log_weights, len(state.log_weights)
    due = exhausted(log_weights)
    if processes.count() > 1 and not due:
        return state, here
    chosen = torch.where(due, systematic(log_weights, uniform), torch.arange(n, device=log_weights.device))
    chosen = processes.share(chosen)

    def taken(rows: Tensor) -> Tensor:
        return processes.gathered(rows)[chosen]

    resampled = state._replace(
        x=taken(state.x),
        momentum=None if state.momentum is None else taken(state.momentum),
        log_weights=torch.where(due, 0.0, log_weights),
        log_z=state.log_z + torch.where(due, log_mean_exp(log_weights), 0.0),
    )
    return resampled, Energy(taken(here.value), taken(here.grad))
