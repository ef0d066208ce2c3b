"""What a loop will need of its device's memory, before it runs.

With N rows and stride S, F = ⌈N/S⌉ slots travel each way through the queue. It is fullest when its slots have moved
forward and have not been pulled back yet. Then the slots on their way forward hold 1 + jS states (j = 1..F−1), the one
that has just turned N, and those on their way back N − iS (i = 1..F−1) and an adjoint each:

    Σ_j (1 + jS) + N + Σ_i (N − iS) = F(N + 1) − 1 states    and    F adjoints,

each of B events: about N²B at stride 1, and N + 1 at stride N, as in the nested loop. One call with gradient serves
F·B samples, and keeps the activations of u_θ and, where a running cost compares them, of u_0.

Activations are what autograd saves, measured on two and on three samples: what grows by a sample is an activation,
and what does not, parameters and constants, is counted elsewhere. Blocks whose activations are computed again on the
way back (gradient checkpointing) keep their inputs, and one of them at a time its activations: those of the largest are
added. Gradients of activations, workspaces of kernels and the allocator's slack come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.denoisers.lora import WATCHING
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError, check_integer, check_type, shown
from implicit_diffusion.gradients import FullBackprop
from implicit_diffusion.loops.nested import Nested
from implicit_diffusion.loops.on_chain import TRIAL, ChainLoop
from implicit_diffusion.loops.queue import Queue
from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class Memory(Shown):
    """A prediction in bytes, at the fullest moment of an iteration.

    Args:
        states: of all trajectories in flight, with their adjoints.
        activations: kept by autograd during the largest call with gradient.
        parameters: θ, its gradient, the optimizer's moments, its moving average, and u_0.
        resident: the part of `parameters` that is in memory already.
        undo: the copy of θ and of the moments that an update can go back to, made when the activations are gone.
    """

    states: int
    activations: int
    parameters: int
    resident: int = 0
    undo: int = 0

    @property
    def total(self) -> int:
        """The sum of the parts, of activations and the copy the larger one."""
        return self.states + max(self.activations, self.undo) + self.parameters

    def _words(self) -> Iterable[str]:
        return (str(self),)

    def __str__(self) -> str:
        passing = "activations" if self.activations >= self.undo else "undo"
        parts = ", ".join(f"{name} {_size(getattr(self, name))}" for name in ("states", passing, "parameters"))
        return f"{_size(self.total)} ({parts})"


def predict_memory(loop: ChainLoop) -> Memory:
    """Predict what `loop` needs; tries its network and objective on three samples, and leaves no trace.

    Raises:
        InvalidInputError: a loop of another kind.
    """
    check_type("loop", loop, ChainLoop, "take a Queue or Nested; loops over particles keep nothing that grows")
    chain, objective, batch = loop.chain, loop.objective, loop.batch
    slots = -(-chain.num_steps // loop.stride) if isinstance(loop, Queue) else 1
    event = torch.empty(chain.event_shape, dtype=chain.dtype, device="meta").nbytes
    states = (slots * (chain.num_steps + 2) - 1) * batch * event

    def pull(n: int) -> object:
        x = torch.zeros(1, n, *chain.event_shape, device=chain.device, dtype=chain.dtype, requires_grad=True)
        condition = chain.conditions(loop.noise, n, [TRIAL])
        rows = chain.trained_rows[:1] or [0]
        transition = chain.transition(x, rows, reference=bool(objective.running), condition=condition)
        return [transition.u, *(cost.cost(transition) for _, cost in objective.running)]

    def finish(n: int) -> object:
        x = torch.zeros(n, *chain.event_shape, device=chain.device, dtype=chain.dtype, requires_grad=True)
        end = chain.endpoint(x, loop.noise, TRIAL)
        return [term.value(end) for _, term in objective.terminal]

    evaluations = chain.evaluations
    with chain.evaluating(), objective.evaluating():
        (row, again), (end, _) = _saved_per_sample(pull), _saved_per_sample(finish)
    chain.evaluations = evaluations
    if isinstance(loop, Nested) and isinstance(loop.estimator, FullBackprop):
        activations = (chain.num_steps * row + max(again, end)) * batch  # every row's, at once
    else:
        activations = max(slots * (row + again), end) * batch

    modules = [m for m in (loop.model, chain.reference, loop.update.ema) if isinstance(m, nn.Module)]
    held = {id(t): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    trained = sum(p.nbytes for p in loop.update.parameters if p.requires_grad)
    resident = sum(held.values())
    moved = round((1 + _moments(loop.update.optimizer)) * trained)
    return Memory(states, activations, resident + moved, resident, moved)


def check_memory(memory: Memory, device: torch.device | str, available: int | None = None) -> None:
    """Refuse a run that will not fit.

    Args:
        memory: see `predict_memory`.
        device: where it is to run; known are "cpu" and "cuda", and on others nothing is refused.
        available: free bytes, in place of what the device reports.

    Raises:
        MemoryLimitError: more is needed, beyond what is in memory already, than is free.
    """
    check_type("memory", memory, Memory, "take predict_memory(loop)")
    try:
        device = torch.device(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"device must be one of torch's, e.g. cpu or cuda, got {shown(device)}") from error
    if available is not None:
        available = check_integer("available", available, 0, 2**63)
    if available is None:
        available = _free(device)
    needed = memory.total - memory.resident
    if available is not None and needed > available:
        raise MemoryLimitError(
            f"the run will not fit: it is predicted to need {memory}, of which {_size(needed)} is still to be "
            f"allocated, but {device} has {_size(available)} free; take a smaller batch, a larger stride of the queue, "
            'loop="nested", gradient checkpointing or low-rank adapters'
        )


def _free(device: torch.device) -> int | None:
    """Free bytes on the device; what torch's allocator holds in reserve is free as well."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    return None


def _saved_per_sample(function: Callable[[int], object]) -> tuple[int, int]:
    """Bytes that autograd saves for each sample that `function` is given, and those of its largest block that is
    computed again on the way back.
    """

    def saved(n: int) -> tuple[int, list[int]]:
        again: list[int] = []
        WATCHING.append(lambda block: again.append(_saved(block)))
        try:
            return _saved(lambda: function(n)), again
        finally:
            WATCHING.pop()

    (two, blocks), (three, larger) = saved(2), saved(3)  # one sample is special: its reshapes copy nothing
    return three - two, max((b - a for a, b in zip(blocks, larger, strict=True)), default=0)


def _saved(function: Callable[[], object]) -> int:
    """Bytes that autograd saves during a call."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _graph = function()  # held until all is counted: no address is given out twice
    return sum(storages.values())


def _moments(optimizer: torch.optim.Optimizer) -> float:
    """Numbers that the optimizer keeps per parameter, found by a step of its like on six of them."""
    p = nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.zeros_like(p)
    try:
        build: Any = type(optimizer)
        probe = build([optimizer.param_groups[0] | {"params": [p]}])
        probe.step()
    except (TypeError, RuntimeError, ValueError):
        return 2.0  # an optimizer that cannot be built like this: as many as Adam
    return sum(x.numel() for x in probe.state[p].values() if isinstance(x, Tensor) and x.ndim) / p.numel()


def _size(count: int) -> str:
    """Bytes for human eyes."""
    power = max(0, min(3, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
