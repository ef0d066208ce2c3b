"""The queue: a single loop over sampler and parameters, with trajectories at every stage in flight.

    each iteration:
      inject a fresh batch x_0 ~ N(0, σ_0² I) at stage 0
      forward: all slots on their way to x_N advance one row under the present θ, in one network call
      a slot that reaches x_N turns round: it gets what it carries back, λ_N under the adjoint
      backward: all slots on their way back are pulled back one row under the present θ, in one call with gradient
      θ ← optimizer(Γ), Γ = the sum of their contributions: one stage from each of N trajectories

Γ has the scale of one nested gradient, at the price of two network calls per iteration in place of 2N. The price is
staleness: a contribution mixes the values of θ that its trajectory met on its way, the oldest up to
2⌈N/stride⌉ − 2 updates ago. With η = 0 one trajectory's contributions add up to its nested gradient.

Which slot moves over which row in which iteration is data: `implicit_diffusion.loops.timetable`. What a slot carries
back, and how, is the estimator's business: `implicit_diffusion.gradients.estimator`.

The paper (Marion et al., arXiv 2402.05468, section 4.2) queues the sampling; queueing the adjoint as well is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.denoisers.sharded import gradient_sync
from implicit_diffusion.errors import check_integer
from implicit_diffusion.gradients import Estimator
from implicit_diffusion.gradients.estimator import (
    Carry,
    Pulled,
    RowEstimator,
    RowStates,
    add_up,
    averaged,
    require_rows,
)
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.loops.timetable import Timetable, injects
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown


@dataclass(repr=False)
class Slot(Shown):
    """One batch of trajectories in flight.

    Args:
        index: of the trajectory.
        born: updates made when it was injected.
        timetable: which rows it moves over when.
        stage: iterations that it has been through.
        states: x_k by row k, this process's: the present one, and those of the rows that are still to be pulled back.
        carry: what it carries on its way back; empty on its way forward.
    """

    index: int
    born: int
    timetable: Timetable
    stage: int = 0
    states: dict[int, Tensor] = field(default_factory=dict)
    carry: Carry = field(default_factory=dict)

    @property
    def row(self) -> int:
        """The row before which it stands: the next one to advance over, or the next one to be pulled back."""
        return max(self.states, default=self.timetable.rows.start - 1)


class Queue(ChainLoop):
    """One network call forward and one with gradient per iteration.

    Args:
        chain: the sampler, whose denoiser is trained in place.
        objective: F, e.g. `Reward(r) + beta * PathKL()`.
        update: a torch optimizer, or an `Update` around one.
        batch: samples of a trajectory, injected together (B).
        noise: source of every random number.
        stride: rows that every slot moves per iteration; N/stride slots are in flight each way. More stride means
            less memory, less staleness and less parallelism; with stride N the queue is the nested loop.
        estimator: of the gradient, one that works row by row; the exact adjoint, `Adjoint()`, if None.

    Raises:
        InvalidInputError: arguments that do not fit together, as in `ChainLoop`; an estimator that differentiates whole
            trajectories.
    """

    estimator: RowEstimator

    def __init__(
        self,
        chain: Chain,
        objective: Objective,
        update: Update | torch.optim.Optimizer,
        *,
        batch: int,
        noise: Noise,
        stride: int = 1,
        estimator: Estimator | None = None,
    ) -> None:
        if isinstance(estimator, Estimator):
            require_rows(estimator, "queue")
        super().__init__(chain, objective, update, batch=batch, noise=noise, estimator=estimator, stride=stride)
        self.slots: list[Slot] = []
        self.values: dict[str, Tensor] = {}  # terminal values of the batch that reached x_N last

    def _words(self) -> Iterable[str]:
        return f"stride={self.stride}", *super()._words(), f"batches in flight={len(self.slots)}"

    @processes.sharing()
    def step(self, *, inject: bool = True) -> dict[str, Any]:
        """One iteration; without `inject`, only what is in flight moves on.

        Returns:
            metrics: the terminal terms of the batch that reached x_N in this iteration, and the running costs where it
            pulled every row, each of another batch. `phase` is "draining" without `inject`, and "filling" while rows
            are still missing; a full queue has none.
        """
        self.iteration += 1
        self.update.begin()
        if inject:
            x = self.chain.initial(self.noise, self.batch, self.injected)
            timetable = self._timetable_of(self.injected)
            self.slots.append(Slot(self.injected, self.update.updates, timetable, states={0: x}))
            self.injected += 1
        watched: list[Tensor] = []
        info: dict[str, Any] = {}
        arrived: dict[str, Tensor] = {}
        costs: dict[str, Tensor] = {}
        measured: dict[str, Tensor] = {}
        pulled: list[int] = []
        with self.chain.evaluating():
            for call in range(self.stride):
                states, values = self._advance(call)
                watched += states
                arrived |= values
            self.values |= arrived
            ages = [self.update.updates - slot.born for slot in self.slots if slot.stage in slot.timetable.back]
            last = max(filter(self._trains, range(self.stride)), default=None)
            for call in range(self.stride):
                with gradient_sync(self.chain.denoiser, call == last):
                    rows, made = self._pull(call)
                watched += made.carry.values()
                pulled += rows
                add_up(costs, made.costs)
                add_up(measured, made.measured)
            full = {slot.stage for slot in self.slots}.issuperset(self.timetable.back)
            for slot in self.slots:
                slot.stage += 1
            if trained := len([row for row in pulled if row not in self.chain.pretrained_rows]):
                watched += self.values.values()
                info = self.update.step(watched, lambda: self._why(self._diagnose(), self.values))
                info |= {"staleness_mean": sum(ages) / len(ages), "staleness_max": max(ages)}
        self._retire()
        every = len(set(pulled)) == self.chain.num_steps
        sums, means = averaged(costs if every else {}, measured if trained else {}, trained)
        phase = {"phase": "draining"} if not inject else {} if full else {"phase": "filling"}
        return self._metrics(arrived | sums) | means | info | phase

    def steps(self, updates: int) -> Iterator[dict[str, Any]]:
        """Step until `updates` updates of θ have been made in all; the last of them drain the queue.

        Injection stops in time for every trajectory to be pulled back completely, except where no number of
        trajectories brings exactly what is wanted: then the last one is left with rows to pull back. See
        `timetable.injects`.
        """
        updates = check_integer("updates", updates, 0)
        while (left := updates - self.update.updates) > 0:
            wanted = left * self.update.accumulate - self.update.pending
            present = [(slot.timetable, slot.stage) for slot in self.slots]
            yield self.step(inject=injects(wanted, present, self._timetable_of(self.injected)))

    def drain(self) -> Iterator[dict[str, Any]]:
        """Step without injecting until nothing is in flight."""
        while self.slots:
            yield self.step(inject=False)

    @processes.sharing()
    def state_dict(self) -> dict[str, Any]:
        slots = [
            {
                "index": slot.index,
                "born": slot.born,
                "stage": slot.stage,
                "states": {row: processes.gathered(x) for row, x in slot.states.items()},
                "carry": {name: processes.gathered(part) for name, part in slot.carry.items()},
            }
            for slot in self.slots
        ]
        return super().state_dict() | {"slots": slots, "values": dict(self.values)}

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"stride": self.stride}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        device = self.chain.device
        self.slots = [
            Slot(
                slot["index"],
                slot["born"],
                self._timetable_of(slot["index"]),
                slot["stage"],
                {row: processes.share(x).to(device) for row, x in slot["states"].items()},
                {name: processes.share(part).to(device) for name, part in slot["carry"].items()},
            )
            for slot in state["slots"]
        ]
        self.values = {name: value.to(device) for name, value in state["values"].items()}

    def _timetable_of(self, index: int) -> Timetable:
        """The timetable of trajectory `index`."""
        return self._timetable(self.estimator.rows_of(self.chain, self.noise, index))

    @torch.no_grad()
    def _advance(self, call: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """All slots on their way forward move over a row; returns their states, and the values of the one that ends."""
        moving = [(slot, own[call]) for slot in self.slots if call < len(own := slot.timetable.forward(slot.stage))]
        arrived: dict[str, Tensor] = {}
        if not moving:
            return [], arrived
        slots, rows = [slot for slot, _ in moving], [row for _, row in moving]
        xi = self.chain.innovation(self.noise, self.batch, [slot.index for slot in slots], rows)
        before = torch.stack([slot.states[row] for slot, row in moving])
        transition = self.chain.transition(before, rows, condition=self._conditions(slots))
        self.evaluations += transition.evaluations
        x = transition.push(xi)
        for (slot, row), state in zip(moving, x):
            if row not in slot.timetable.rows:
                del slot.states[row]
            if row + 1 < self.chain.num_steps:
                slot.states[row + 1] = state.clone()  # a view would keep its whole iteration alive
            else:
                end = self.chain.endpoint(state, self.noise, slot.index)
                slot.carry, values = self.estimator.turn(self.objective, end)
                arrived |= values
        return [x], arrived

    def _pull(self, call: int) -> tuple[list[int], Pulled]:
        """All slots on their way back are pulled back over their next row; returns the rows and what the call returned.

        `call` counts the calls of this iteration, of which there are `stride`.
        """
        turned = self._turned(call)
        if not turned:
            return [], Pulled({}, {}, 0)
        slots, rows = [slot for slot, _ in turned], [row for _, row in turned]
        x = torch.stack([slot.states.pop(row) for slot, row in turned])
        at = RowStates(x, rows, [slot.index for slot in slots], self.noise, self._conditions(slots))
        carry = {name: torch.stack([slot.carry[name] for slot in slots]) for name in slots[0].carry}
        pulled = self.estimator.pull(self.chain, self.objective, at, carry)
        self.evaluations += pulled.evaluations
        for place, slot in enumerate(slots):
            slot.carry = {name: part[place] for name, part in pulled.carry.items()}
        return rows, pulled

    def _turned(self, call: int) -> list[tuple[Slot, int]]:
        """The slots that are pulled back in a call of this iteration, and over which row."""
        return [(slot, own[call]) for slot in self.slots if call < len(own := slot.timetable.backward(slot.stage))]

    def _trains(self, call: int) -> bool:
        """Whether a call adds to Γ."""
        return any(row not in self.chain.pretrained_rows for _, row in self._turned(call))

    def _retire(self) -> None:
        """Free what slots hold that have been pulled back over all of their rows. Those that leave early, where their
        number of rows is random, stay in the list until the longest one would leave.
        """
        for slot in self.slots:
            if slot.stage >= slot.timetable.length:
                slot.carry = {}
        flying = any(slot.states for slot in self.slots)
        self.slots = [slot for slot in self.slots if flying and slot.stage < self.timetable.length]

    def _conditions(self, slots: list[Slot]) -> dict[str, Tensor] | None:
        return self.chain.conditions(self.noise, self.batch, [slot.index for slot in slots])

    def _diagnose(self) -> str | None:
        states = [(f"states x_{row}", slot, x) for slot in self.slots for row, x in slot.states.items()]
        carried = [
            (f"{self.estimator.parts.get(name, name)}_{slot.row + 1}", slot, part)
            for slot in self.slots
            for name, part in slot.carry.items()
        ]
        for what, slot, x in states + carried:
            if not x.isfinite().all():
                return f"iteration {self.iteration}: {what} of trajectory {slot.index} hold NaN or infinity"
        return None
