"""The queue: a single loop over sampler and parameters, with trajectories at every stage in flight.

    each iteration:
      inject a fresh batch x_0 ~ N(0, σ_0² I) at stage 0
      forward: all slots at stages 0..N−1 advance one row under the present θ, in one network call
      a slot that reaches stage N gets its λ_N and turns round
      backward: all slots with an adjoint are pulled back one row under the present θ, in one call with gradient
      θ ← optimizer(Γ), Γ = the sum of their contributions: one stage from each of N trajectories

Γ has the scale of one nested gradient, at the price of two network calls per iteration in place of 2N. The price is
staleness: a contribution mixes the values of θ that its trajectory met on its way, the oldest up to
2⌈N/stride⌉ − 2 updates ago. With η = 0 one trajectory's contributions add up to its nested adjoint.

The paper (Marion et al., arXiv 2402.05468, section 4.2) queues the sampling; queueing the adjoint as well is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import check_integer
from implicit_diffusion.gradients.adjoint import pull_back, terminal_adjoint
from implicit_diffusion.loops.on_chain import ChainLoop
from implicit_diffusion.showing import Shown


@dataclass(repr=False)
class Slot(Shown):
    """One batch of trajectories in flight.

    On its way forward (no adjoint yet) it holds x_0..x_k and stands before row k; on its way back it holds the same
    and λ_{k+1}, and row k is the next to be pulled back.
    """

    index: int
    born: int  # updates made when it was injected
    states: list[Tensor]
    adjoint: Tensor | None = None

    @property
    def row(self) -> int:
        return len(self.states) - 1


class Queue(ChainLoop):
    """One network call forward and one with gradient per iteration.

    Args:
        stride: rows that every slot moves per iteration; N/stride slots are in flight each way. More stride means
            less memory, less staleness and less parallelism; with stride N the queue is the nested loop.

    The other arguments are those of `ChainLoop`.
    """

    def __init__(self, *args: Any, stride: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stride = check_integer("stride", stride, 1, self.chain.num_steps, note=" (the chain's steps)")
        self.slots: list[Slot] = []
        self.values: dict[str, Tensor] = {}  # last seen: terminal values
        self.costs: dict[str, dict[int, Tensor]] = {}  # last seen: running costs by row

    def _words(self) -> Iterable[str]:
        return f"stride={self.stride}", *super()._words(), f"batches in flight={len(self.slots)}"

    def step(self, *, inject: bool = True) -> dict[str, Any]:
        """One iteration; without `inject`, only what is in flight moves on."""
        self.iteration += 1
        self.update.begin()
        if inject:
            x = self.chain.initial(self.noise, self.batch, self.injected)
            self.slots.append(Slot(self.injected, self.update.updates, [x]))
            self.injected += 1
        watched: list[Tensor] = []
        info: dict[str, Any] = {}
        contributed = False
        with self.chain.evaluating():
            for _ in range(self.stride):
                watched += self._advance()
            ages = [self.update.updates - slot.born for slot in self.slots if slot.adjoint is not None]
            for _ in range(self.stride):
                adjoints, rows = self._pull()
                watched += adjoints
                contributed |= any(row not in self.chain.pretrained_rows for row in rows)
            if contributed:
                watched += self.values.values()
                info = self.update.step(watched, self._diagnose)
                info |= {"staleness_mean": sum(ages) / len(ages), "staleness_max": max(ages)}
        self.slots = [slot for slot in self.slots if slot.states]
        full = {name: rows for name, rows in self.costs.items() if len(rows) == self.chain.num_steps}
        sums = {name: torch.stack(list(rows.values())).sum() for name, rows in full.items()}
        return self._metrics(self.values | sums) | info

    def run(self, updates: int) -> Iterator[dict[str, Any]]:
        """Step until `updates` updates of θ have been made in all; the last of them drain the queue.

        Injection stops in time for every trajectory to come home: one injected now is on its way for 2⌈N/stride⌉ − 1
        iterations, of which those bring a gradient that begin after the oldest in flight has turned round.
        """
        updates = check_integer("updates", updates, 0)
        while (left := updates - self.update.updates) > 0:
            gradients = left * self.update.accumulate - self.update.pending
            yield self.step(inject=gradients > 2 * self._flight - 2 - self._blind or not self.slots)

    def drain(self) -> Iterator[dict[str, Any]]:
        """Step without injecting until nothing is in flight."""
        while self.slots:
            yield self.step(inject=False)

    def state_dict(self) -> dict[str, Any]:
        slots = [{"index": s.index, "born": s.born, "states": list(s.states), "adjoint": s.adjoint} for s in self.slots]
        return super().state_dict() | {"slots": slots, "values": dict(self.values), "costs": dict(self.costs)}

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"stride": self.stride}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.chain.device
        self.slots = [
            Slot(
                slot["index"],
                slot["born"],
                [x.to(device) for x in slot["states"]],
                None if slot["adjoint"] is None else slot["adjoint"].to(device),
            )
            for slot in state["slots"]
        ]
        self.values = {name: value.to(device) for name, value in state["values"].items()}
        self.costs = {
            name: {row: cost.to(device) for row, cost in rows.items()} for name, rows in state["costs"].items()
        }

    @property
    def _flight(self) -> int:
        """Iterations that a trajectory takes one way."""
        return -(-self.chain.num_steps // self.stride)

    @property
    def _blind(self) -> int:
        """Iterations from now on, the next included, that bring no gradient yet."""
        first = range(self.chain.num_steps)[-self.stride :]  # rows pulled in a slot's first iteration back
        idle = all(row in self.chain.pretrained_rows for row in first)
        made = (self._flight if slot.adjoint is not None else slot.row // self.stride for slot in self.slots)
        return max(0, self._flight - 1 + idle - max(made, default=0))

    @torch.no_grad()
    def _advance(self) -> list[Tensor]:
        """All slots on their way forward move one row; returns the new states."""
        moving = [slot for slot in self.slots if slot.adjoint is None]
        if not moving:
            return []
        rows = [slot.row for slot in moving]
        xi = self.chain.innovation(self.noise, self.batch, [slot.index for slot in moving], rows)
        condition = self._conditions(moving)
        x = self.chain.transition(torch.stack([slot.states[-1] for slot in moving]), rows, condition=condition).push(xi)
        for slot, state in zip(moving, x):
            if slot.row + 1 < self.chain.num_steps:
                slot.states.append(state.clone())  # a view would keep its whole iteration alive
            else:
                end = self.chain.endpoint(state, self.noise, slot.index)
                slot.adjoint, values = terminal_adjoint(self.objective, end.x, end.condition)
                self.values |= values
        return [x]

    def _pull(self) -> tuple[list[Tensor], list[int]]:
        """All slots on their way back are pulled back one row; returns the new adjoints and the rows."""
        turned = [(slot, slot.adjoint) for slot in self.slots if slot.adjoint is not None and slot.states]
        if not turned:
            return [], []
        rows = [slot.row for slot, _ in turned]
        x = torch.stack([slot.states.pop() for slot, _ in turned])
        lam = torch.stack([lam for _, lam in turned])
        condition = self._conditions([slot for slot, _ in turned])
        adjoint, costs = pull_back(self.chain, self.objective, x, rows, lam, condition)
        for (slot, _), lam in zip(turned, adjoint):
            slot.adjoint = lam
        for name, cost in costs.items():
            self.costs.setdefault(name, {}).update(zip(rows, cost))
        return [adjoint], rows

    def _conditions(self, slots: list[Slot]) -> dict[str, Tensor] | None:
        return self.chain.conditions(self.noise, self.batch, [slot.index for slot in slots])

    def _diagnose(self) -> str | None:
        states = [(f"states x_{k}", slot, x) for slot in self.slots for k, x in enumerate(slot.states)]
        adjoints = [(f"adjoints λ_{slot.row + 1}", slot, slot.adjoint) for slot in self.slots]
        for what, slot, x in states + adjoints:
            if x is not None and not x.isfinite().all():
                return f"iteration {self.iteration}: {what} of trajectory {slot.index} hold NaN or infinity"
        return self._bad_value(self.values)
