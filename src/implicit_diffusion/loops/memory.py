"""What a loop over a chain will need of its device's memory, before it runs; of several processes, each.

It follows from the loop's timetable and from what its estimator needs per sample. In the middle of an iteration, when
its slots have moved forward and have not been pulled back yet, a full queue with N rows, stride S and F = ⌈N/S⌉ holds,
where every row is pulled back,

    Σ_j (1 + jS) + N + Σ_i (N − iS) = F(N + 1) − 1 states    and    F carries (adjoints),    j, i = 1, …, F − 1

each of B events: about N²B at stride 1, and N + 1 at stride N, as in the nested loop. One call with gradient serves
F·B samples, and keeps the activations of u_θ and, where a running cost compares them, of u_0.

How activations are measured is described in `implicit_diffusion.gradients.footprint`. Gradients of activations,
workspaces of kernels and the allocator's slack come on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.denoisers.conditions import Embedded
from implicit_diffusion.denoisers.embedding_table import EmbeddingTable
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError, check_integer, check_type, shown
from implicit_diffusion.gradients.footprint import bytes_of
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.models.pipelines.denoiser import PipelineDenoiser, Plan
from implicit_diffusion.processes import own
from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class Memory(Shown):
    """A prediction in bytes, at the fullest moment of an iteration.

    Args:
        states: of all trajectories in flight, with what they carry back (adjoints).
        activations: kept by autograd during the largest call with gradient.
        parameters: θ, its gradient, the optimizer's moments, its moving average, u_0, tables of embeddings that stay on
            the device, and what the estimator learns.
        resident: the part of `parameters` that is in memory already.
        undo: the copy of θ and of the moments that undoes a failed update, made when the activations are freed.
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
        parts = ", ".join(f"{name} {in_units(getattr(self, name))}" for name in ("states", passing, "parameters"))
        return f"{in_units(self.total)} ({parts})"


def predict_memory(loop: ChainLoop) -> Memory:
    """Predict what `loop` needs; tries its network and objective on three samples, and leaves no trace.

    Raises:
        InvalidInputError: a loop of another kind.
    """
    check_type("loop", loop, ChainLoop, "use a Queue or Nested; loops over particles keep nothing that grows")
    chain, batch, timetable = loop.chain, loop.batch, loop.timetable
    batch //= processes.world_size()
    need = loop.estimator.memory(chain, loop.objective, loop.noise)
    back = len(timetable.back)
    states = batch * (timetable.states_in_flight * bytes_of(chain.event_shape, chain.dtype) + back * need.carry)
    activations = batch * (need.held + max(back * need.pull, need.turn))

    modules = [m for m in (loop.model, chain.reference, loop.update.ema) if isinstance(m, nn.Module)]
    held = {id(t): own(t).nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    trained = sum(own(p).nbytes for p in loop.update.parameters if p.requires_grad)
    parts = [part for module in modules for part in module.modules()]
    tables: dict[int, EmbeddingTable | Plan] = {
        id(part.table): part.table for part in parts if isinstance(part, Embedded)
    }
    tables |= {id(part.plan): part.plan for part in parts if isinstance(part, PipelineDenoiser)}
    resident = sum(held.values()) + sum(table.kept for table in tables.values())
    moved = round((1 + _moments(loop.update.optimizer)) * trained)
    return Memory(states, activations, resident + moved + need.kept, resident, moved)


def check_memory(memory: Memory, device: torch.device | str, available: int | None = None) -> None:
    """Refuse a run that will not fit.

    Args:
        memory: see `predict_memory`.
        device: where it is to run; "cpu" and "cuda" report what is free; on others nothing is refused.
        available: free bytes, in place of what the device reports.

    Raises:
        MemoryLimitError: more is needed, beyond what is in memory already, than is free.
    """
    check_type("memory", memory, Memory, "use predict_memory(loop)")
    try:
        device = torch.device(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"device must be one of torch's, e.g. cpu or cuda, got {shown(device)}") from error
    if available is not None:
        available = check_integer("available", available, 0, 2**63)
    if available is None:
        available = free_memory(device)
    needed = memory.total - memory.resident
    if available is not None and needed > available:
        raise MemoryLimitError(
            f"the run will not fit: it is predicted to need {memory}, of which {in_units(needed)} is still to be "
            f"allocated, but {device} has {in_units(available)} free; use a smaller batch, a larger stride of the "
            'queue, loop="nested", gradient checkpointing or low-rank adapters'
        )


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device; what torch's allocator holds in reserve is free as well."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    return None


def _moments(optimizer: torch.optim.Optimizer) -> float:
    """Numbers that the optimizer keeps per parameter, measured by a step of a copy on six of them."""
    p = nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.zeros_like(p)
    try:
        build: Any = type(optimizer)
        probe = build([optimizer.param_groups[0] | {"params": [p]}])
        probe.step()
    except (TypeError, RuntimeError, ValueError):
        return 2.0  # an optimizer that cannot be built like this: as many as Adam
    return sum(x.numel() for x in probe.state[p].values() if isinstance(x, Tensor) and x.ndim) / p.numel()


def in_units(count: int) -> str:
    """Bytes with a unit, to three digits."""
    power = max(0, min(3, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"
