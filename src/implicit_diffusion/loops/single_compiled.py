"""How iterations of the single loop run as one call: several at a time, compiled, with the optimizer's step inside.

In one call nothing waits for the device between an iteration and its update of θ, and the compiler sees both. So an
update must be the optimizer's step and nothing else. It cannot raise: once something is not finite, `Update.masked`
leaves θ as it is in all the iterations that follow, and the alarm, which the loop reads after the call, says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.gradients.fused import ONE, Fused, OneRun
from implicit_diffusion.loops.update import Update
from implicit_diffusion.samplers.kernel import Info
from implicit_diffusion.samplers.weighted_state import WeightedState
from implicit_diffusion.showing import of_tuple

# What an iteration needs from outside of what may be compiled: the random numbers of the kernel and one U(0, 1) for
# resampling; for every term of the objective the points besides the particles that it charges; the step size.
Inputs = tuple[tuple[Tensor, ...], list[Tensor | None], Tensor]


class Iteration(NamedTuple):
    """What an iteration yields.

    Args:
        state: the particles after it.
        gradients: Γ, one tensor per parameter; None for parameters that V does not use.
        values: of the terms of the objective, by name.
        info: what is reported as it is: effective sample size, log Z, lag, acceptance.
        norm: of Γ; of this process's part of it where several share the particles.
        alarm: a number that is finite if the particles, and V at them, are; likewise.
        overflow: a number that is finite if θ is after the updates made along with the iteration; None where there
            were none.
    """

    state: WeightedState
    gradients: tuple[Tensor | None, ...]
    values: dict[str, Tensor]
    info: dict[str, Tensor]
    norm: Tensor
    alarm: Tensor
    overflow: Tensor | float = 0.0

    def __repr__(self) -> str:
        return of_tuple(self)


def iteration_of(
    state: WeightedState, fused: Fused, info: dict[str, Any], of_move: Info, runs: OneRun = ONE
) -> Iteration:
    """One iteration's results, with the norm of Γ and one number that is finite if the particles, and V at them, are.

    Inductor fuses `vector_norm`, but not `_foreach_norm`, where it ends a kernel. The norm of Γ must not end one: the
    pulls in x and in θ would land in two, and each compute the same derivatives of V anew. At the end of an iteration
    a break is welcome: without it the intermediate results of all iterations of one call are alive together.

    Args:
        state: where the particles are.
        fused: the pass that Γ comes from.
        info: what is reported as it is.
        of_move: diagnostics of the kernel's step.
        runs: how many runs the iteration serves.
    """
    norm = runs.norm([g for g in fused.gradients if g is not None])
    alarm = torch.nn.utils.get_total_norm([state.x.sum() + fused.total])
    if of_move.acceptance is not None:
        info = info | {"acceptance": processes.mean(runs.stacked(of_move.acceptance).mean(runs.dim))}
    return Iteration(state, fused.gradients, fused.values, info, norm, alarm)


def in_one_call(
    iterate: Callable[..., Iteration],
    update: Update,
    parameters: Sequence[Tensor],
    state: WeightedState,
    inputs: list[Inputs],
) -> Iteration:
    """As many iterations as there are inputs, each with its update of θ: what is compiled.

    Args:
        iterate: one iteration from (state, *inputs), which leaves θ alone.
        update: the optimizer's step and nothing else, `update.optimizer_only`.
        parameters: θ, in the order of the gradients.
        state: the particles.
        inputs: those of every iteration.

    Returns:
        the last iteration without its gradients, with the alarm and the overflow of all of them.
    """
    alarm = overflow = state.x.new_zeros(())
    for each in inputs:
        done = summed(iterate(state, *each))
        state = done.state
        alarm = alarm + done.alarm + done.norm.sum()
        overflow = overflow + update.masked(parameters, done.gradients, alarm.isfinite())
        alarm = alarm + overflow
    return Iteration(state, (), done.values, done.info, done.norm, alarm, overflow)


def summed(done: Iteration) -> Iteration:
    """An iteration of all processes together: with their Γ, its norm, and one alarm for all."""
    if processes.count() == 1:
        return done
    gradients = [g for g in done.gradients if g is not None]
    processes.sum_gradients(gradients)  # in place
    norm = torch.nn.utils.get_total_norm(gradients)
    return done._replace(norm=norm, alarm=processes.total(done.alarm))
