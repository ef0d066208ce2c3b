"""The networks of a loop, compiled where that pays: for the calls of its steady state, and no others.

    call once, eagerly       how many samples reach the networks, with gradients or without
    compile these calls      u_θ without gradient, u_θ with, u_0 with: three graphs
    time both                the faster one is kept

What is called is what an iteration of a full queue calls, or a step of the nested loop: the networks without gradient
on the rows of the slots on their way forward, and the estimator's own `pull` on those on their way back. All else runs
as it is: a queue that fills or drains, evaluations, weight averages, the few samples on rows that keep the pretrained
network. Times differ from run to run, so the choice is kept in the folder of the run, and a resumed run makes it again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.commands.finetune.problem.precision import networks_of
from implicit_diffusion.compiled import CompiledAt
from implicit_diffusion.gradients.estimator import RowEstimator, RowStates
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective, Reward, Sum
from implicit_diffusion.runs import RunDirectory, records
from implicit_diffusion.runs.clock import part
from implicit_diffusion.samplers.chain import TRIAL

CHOICE = "compiled.json"
REPEATS = 3  # of which the fastest counts


@part("compiling")
def compile_networks(loop: ChainLoop, directory: RunDirectory, *, resumed: bool) -> str:
    """Compile u_θ and u_0 of the loop where that makes it faster; returns in words what became of it.

    Args:
        loop: that is to be trained.
        directory: of the run, which keeps the choice.
        resumed: whether the run has made updates, and with them the choice.
    """
    networks, work = networks_of(loop.chain), Iteration(loop)
    before = processes.from_main(lambda: records.read(directory.path / CHOICE)) if resumed else None
    if before is not None and not before["kept"]:
        return str(before["note"])
    calls = _calls(networks, work)
    eager = None if before else _seconds(work)
    samples = " and ".join(str(n) for n in sorted({n for own in calls for n, _ in own}))
    print(f"compile   the networks for {samples} samples a call, which can take a minute or more")
    began = time.perf_counter()
    made = [CompiledAt(network.model, own) for network, own in zip(networks, calls, strict=True)]
    for network, compiled in zip(networks, made, strict=True):
        network.compiled = compiled
    work()
    for compiled in made:
        compiled.complete()
    took = time.perf_counter() - began
    reasons = [each.compiled.reason for each in made if each.compiled.reason]
    if before is not None and not reasons:
        return str(before["note"])
    fast = _seconds(work)
    kept, note = processes.from_main(lambda: _choice(reasons, eager, fast, took))
    if not kept:
        for network in networks:
            network.compiled = None
    records.write(directory.path / CHOICE, {"kept": kept, "note": note})
    print(f"compile   {note}")
    return note


def _choice(reasons: list[str], eager: float | None, fast: float, took: float) -> tuple[bool, str]:
    if reasons:
        return False, f"not compiled: {reasons[0]}"
    assert eager is not None
    times = f"{fast:.3g} s an iteration, {eager:.3g} s without"
    return (True, f"compiled in {took:.0f} s: {times}") if fast < eager else (False, f"not used, since slower: {times}")


class Iteration:
    """One iteration of the loop in its steady state, on made-up samples: called, it changes nothing.

    Args:
        loop: that is to be trained.
    """

    def __init__(self, loop: ChainLoop) -> None:
        self.loop = loop
        chain, timetable = loop.chain, loop.timetable
        self.objective: Objective = Sum(
            tuple((w, Reward(_mean)) if isinstance(term, Reward) else (w, term) for w, term in loop.objective.terms)
        )
        trained = chain.trained_rows
        self.forward = [_first(timetable.forward(stage), trained) for stage in range(timetable.flight)]
        self.back = [_first(timetable.backward(stage), trained) for stage in timetable.back]
        self.device = chain.device

    @processes.sharing()
    def __call__(self) -> None:
        loop, noise = self.loop, Noise(0)
        chain, estimator = loop.chain, copy.deepcopy(loop.estimator)
        gradients = [(p, p.grad) for p in loop.update.parameters]
        for p, _ in gradients:
            p.grad = None
        try:
            with chain.evaluating():
                if not isinstance(estimator, RowEstimator):
                    estimator.gradient(chain, self.objective, noise, loop.batch, TRIAL)
                    return
                with torch.no_grad():
                    x, condition = self._slots(self.forward, noise)
                    chain.transition(x, self.forward, condition=condition)
                carry, _ = estimator.turn(self.objective, chain.endpoint(x[0], noise, TRIAL))
                x, condition = self._slots(self.back, noise)
                at = RowStates(x, self.back, [TRIAL] * len(self.back), noise, condition)
                carried = {name: torch.stack([value] * len(self.back)) for name, value in carry.items()}
                estimator.pull(chain, self.objective, at, carried)
        finally:
            for p, gradient in gradients:
                p.grad = gradient

    def _slots(self, rows: list[int], noise: Noise) -> tuple[Tensor, Any]:
        chain, batch = self.loop.chain, self.loop.batch
        x = torch.stack([chain.initial(noise, batch, TRIAL)] * len(rows))
        return x, chain.conditions(noise, batch, [TRIAL] * len(rows))


def _mean(x: Tensor) -> Tensor:
    """A reward that costs nothing."""
    return x.flatten(1).mean(1)


def _first(rows: Sequence[int], among: Collection[int]) -> int:
    """The first of the rows among others, or else the first one."""
    return next((row for row in rows if row in among), rows[0])


def _calls(networks: list[Any], work: Iteration) -> list[set[tuple[int, bool]]]:
    """The calls of every network that have at least half as many samples as its largest."""
    calls: list[set[tuple[int, bool]]] = [set() for _ in networks]

    def seen(model: Callable[..., Any], own: set[tuple[int, bool]]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            own.add((len(x), torch.is_grad_enabled()))
            return model(x, *args, **kwargs)

        return call

    for network, own in zip(networks, calls, strict=True):
        network.compiled = seen(network.model, own)
    try:
        work()
    finally:
        for network in networks:
            network.compiled = None
    return [{(n, grad) for n, grad in own if 2 * n >= max(own)[0]} for own in calls]


def _seconds(work: Iteration) -> float:
    """Of one call, the fastest of a few."""

    def one() -> float:
        began = time.perf_counter()
        work()
        if work.device.type != "cpu":
            torch.accelerator.synchronize(work.device)
        return time.perf_counter() - began

    return min(one() for _ in range(REPEATS))
