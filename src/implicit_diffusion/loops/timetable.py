"""The queue's timetable: which rows a trajectory moves over in which iteration after it was injected.

With N rows and stride S, a trajectory is on its way forward for F = ⌈N/S⌉ iterations, S rows in each of them:

    stage p = 0, …, F − 1       forward over rows pS, …, pS + S − 1

It turns round at x_N, in the middle of stage F − 1, and is pulled back over its last K rows (K = N for the adjoint):

    stage F − 1 + j, j ≥ 0      back over rows N − 1 − jS, …, N − S − jS, down to N − K

and leaves after stage F − 2 + ⌈K/S⌉. From this follow the step of the queue, its drain, its memory and the age of its
contributions. Of the states it keeps the present one and those of the rows that are still to be pulled back.

`grid` prints it as a table of trajectories and iterations, one of them injected in each: `→k` is row k forward, `←k`
the same row pulled back, `(k)` a row pulled back that keeps the pretrained network, so that it brings no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from implicit_diffusion.errors import InvalidInputError, check_integer, check_type
from implicit_diffusion.showing import Shown, brief


@dataclass(frozen=True, repr=False)
class Timetable(Shown):
    """Of one trajectory, in stages: iterations since it was injected.

    Args:
        num_steps: N.
        stride: S, rows per iteration.
        rows: those that are pulled back, the last K.
        silent: rows that bring no gradient when they are pulled back, because they keep the pretrained network.

    Raises:
        InvalidInputError: a stride outside of 1..N; rows that are not the last ones.
    """

    num_steps: int
    stride: int
    rows: range
    silent: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        last = check_integer("num_steps", self.num_steps)
        check_integer("stride", self.stride, 1, last, note=" (the chain's steps)")
        check_type("rows", self.rows, range, f"use range(k, {last})")
        if not self.rows or self.rows != range(max(self.rows.start, 0), last):
            raise InvalidInputError(
                f"rows must be the last of {last}, range(k, {last}) with 0 ≤ k < {last}, got {self.rows}"
            )

    def _words(self) -> Iterable[str]:
        yield f"num_steps={self.num_steps}"
        yield f"stride={self.stride}"
        yield f"rows={self.rows.start}..{self.rows.stop - 1}"
        if self.silent:
            yield f"silent={brief(sorted(self.silent))}"

    @cached_property
    def flight(self) -> int:
        """F, the stages on the way forward; the trajectory turns round in the last of them."""
        return -(-self.num_steps // self.stride)

    @cached_property
    def length(self) -> int:
        """Stages until the trajectory leaves."""
        return self.flight - 1 + -(-len(self.rows) // self.stride)

    @cached_property
    def back(self) -> range:
        """The stages on the way back: the ages of its contributions, in iterations."""
        return range(self.flight - 1, self.length)

    def forward(self, stage: int) -> range:
        """The rows advanced in a stage, in order."""
        return self._moves[stage][0] if stage < self.length else range(0)

    def backward(self, stage: int) -> range:
        """The rows pulled back in a stage, in order."""
        return self._moves[stage][1] if stage < self.length else range(0)

    @cached_property
    def _moves(self) -> list[tuple[range, range]]:
        rows, back, moves = range(self.num_steps), self.rows[::-1], []
        for stage in range(self.length):
            first, turned = stage * self.stride, (stage - self.flight + 1) * self.stride
            pulled = back[turned : turned + self.stride] if turned >= 0 else range(0)
            moves.append((rows[first : first + self.stride], pulled))
        return moves

    @cached_property
    def moving(self) -> frozenset[int]:
        """The stages that bring a gradient."""
        return frozenset(stage for stage in self.back if not self.silent.issuperset(self.backward(stage)))

    def states(self, stage: int) -> int:
        """States that the trajectory holds in the middle of a stage: advanced, and not yet pulled back."""
        if stage >= self.flight - 1:
            return len(self.rows) - (stage - self.flight + 1) * self.stride
        present = (stage + 1) * self.stride
        return 1 + len(range(max(0, self.rows.start), present))

    @cached_property
    def states_in_flight(self) -> int:
        """States that a full queue holds in the middle of an iteration: one trajectory in every stage."""
        return sum(self.states(stage) for stage in range(self.length))

    def grid(self, iterations: int | None = None) -> str:
        """The first iterations as a table, a row per trajectory, with the rows pulled back together and the updates.

        Args:
            iterations: columns; enough for the first full iteration and one more by default.
        """
        count = self.length + 1 if iterations is None else iterations
        cells = [[self._cell(i - born) for i in range(count)] for born in range(count)]
        pulled = [
            sorted({row for stage in range(i + 1) for row in self.backward(stage)}, reverse=True) for i in range(count)
        ]
        updates = ["✓" if any(stage in self.moving for stage in range(i + 1)) else "–" for i in range(count)]
        lines = [("iteration", [str(i) for i in range(count)])]
        lines += [(f"trajectory {born}", line) for born, line in enumerate(cells)]
        lines += [("rows pulled", [" ".join(map(str, rows)) for rows in pulled]), ("update", updates)]
        label = max(len(name) for name, _ in lines)
        widths = [max(len(line[i]) for _, line in lines) for i in range(count)]
        return "\n".join(
            "  ".join([name.ljust(label), *(cell.ljust(width) for cell, width in zip(line, widths))]).rstrip()
            for name, line in lines
        )

    def _cell(self, stage: int) -> str:
        if not 0 <= stage < self.length:
            return ""
        forward = [f"→{row}" for row in self.forward(stage)]
        return " ".join([*forward, *(f"({k})" if k in self.silent else f"←{k}" for k in self.backward(stage))])


def injects(wanted: int, present: Sequence[tuple[Timetable, int]], next_one: Timetable) -> bool:
    """Whether to inject one more trajectory now, so that none is wasted if `wanted` more gradients are to be made.

    If it is the last one, it and every trajectory in flight have been pulled back completely once these gradients are
    made. Where those in flight bring too few, and one more would bring too many whenever it sets out, it does so at
    once: only a trajectory can bring what is still wanted.
    """
    if wanted >= next_one.length:
        return True
    brought, moving = coming(present), next_one.moving
    totals = [len(brought | {stage + delay for stage in moving}) for delay in range(1 + max(brought, default=0))]
    return totals[0] <= wanted or len(brought) < wanted < min(totals)


def coming(slots: Iterable[tuple[Timetable, int]]) -> set[int]:
    """The iterations from now on, counted from 0, that bring a gradient if no other trajectory is injected.

    Args:
        slots: the timetable of each trajectory in flight, and its next stage.
    """
    return {stage - now for timetable, now in slots for stage in timetable.moving if stage >= now}
