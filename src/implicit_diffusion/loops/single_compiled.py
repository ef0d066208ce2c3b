"""How iterations of the single loop run as one call: several at a time, compiled, with the optimizer's step inside.

In one call nothing waits for the device between an iteration and its update of θ, and the compiler sees both. So an
update must be the optimizer's step and nothing else. It cannot raise: once something is not finite, `Update.masked`
leaves θ as it is in all the iterations that follow, and the alarm, which the loop reads at the end of the call, says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from implicit_diffusion.loops.compiled import Compiled
from implicit_diffusion.loops.update import Update
from implicit_diffusion.samplers.weighted_state import WeightedState
from implicit_diffusion.showing import of_tuple


class Inputs(NamedTuple):
    """What an iteration needs from outside of what may be compiled.

    Args:
        draws: the random numbers of the kernel, and one U(0, 1) for resampling.
        points: for every term of the objective the points besides the particles that it charges.
        h: the step size, a 0-d tensor.
    """

    draws: tuple[Tensor, ...]
    points: list[Tensor | None]
    h: Tensor

    def __repr__(self) -> str:
        return of_tuple(self)


class Iteration(NamedTuple):
    """What an iteration yields.

    Args:
        state: the particles after it.
        gradients: Γ, one tensor per parameter; None for parameters that V does not use.
        values: of the terms of the objective, by name.
        info: what is reported as it is: effective sample size, log Z, lag, acceptance.
        norm: of Γ.
        alarm: a number that is finite if the particles, and V at them, are.
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


class OneCall:
    """Iterations and their updates of θ as one function, compiled or not.

    Args:
        iterate: one iteration, which leaves θ alone.
        update: the optimizer's step, `update.plain`.
        parameters: θ, in the order of the gradients.
        compiled: whether to compile, from the second call on: the first one creates the optimizer's state.
    """

    def __init__(
        self,
        iterate: Callable[[WeightedState, Inputs], Iteration],
        update: Update,
        parameters: Sequence[Tensor],
        *,
        compiled: bool,
    ) -> None:
        self.iterate, self.update, self.parameters = iterate, update, parameters
        self.compiled = Compiled(self._iterations) if compiled else None

    def __call__(self, state: WeightedState, inputs: list[Inputs]) -> Iteration:
        """The last of as many iterations as there are inputs, with the alarm and the overflow of all of them."""
        if self.compiled is None or self.update.updates == 0:
            return self._iterations(state, inputs)
        done: Iteration = self.compiled(state, inputs)
        return done

    def _iterations(self, state: WeightedState, inputs: list[Inputs]) -> Iteration:
        alarm = overflow = torch.zeros_like(state.log_z)
        for each in inputs:
            done = self.iterate(state, each)
            state = done.state
            alarm = alarm + done.alarm + done.norm
            overflow = overflow + self.update.masked(self.parameters, done.gradients, alarm.isfinite())
            alarm = alarm + overflow
        return done._replace(alarm=alarm, overflow=overflow)
