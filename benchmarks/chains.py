"""What the queue and the adjoint cost, beside the bare network calls, the nested loop and full backpropagation.

    python benchmarks/chains.py                    # everything: a table each, and benchmarks/results/chains-*.json
    python benchmarks/chains.py --parts cost       # one part, in a file of its own

cost        one iteration of the queue in steady state against the bare network calls that it needs: no gradient for
            the batch that moves forward; forward and vector-Jacobian product for the batch that is pulled back; with
            the path KL also the frozen network's. Same shapes and process, taking turns; Adam's step is on both sides.
throughput  updates per second, queue against nested, with the same number of trajectories per update.
memory      peak memory and seconds of one gradient, adjoint against full backpropagation, in fresh processes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from common import DEVICE, DIGITS, Problem, hardware, interleaved, ratio, save, synchronize

from implicit_diffusion import Nested, Noise, Queue
from implicit_diffusion.gradients import Adjoint, FullBackprop
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.loops.queue import Slot

ESTIMATORS = {"adjoint": Adjoint, "full backpropagation": FullBackprop}


@dataclass(frozen=True)
class Config:
    """What to measure; the defaults are the published setting."""

    parts: tuple[Literal["cost", "throughput", "memory"], ...] = ("cost", "throughput", "memory")
    cost: tuple[tuple[int, int], ...] = ((10, 8), (10, 16), (50, 4), (50, 8))  # (N, B)
    throughput: tuple[tuple[int, tuple[int, ...]], ...] = ((10, (1, 2, 4, 8, 16, 32, 64)), (50, (1, 4, 16)))
    memory: tuple[int, ...] = (10, 50, 200)
    memory_batch: int = 8
    repeats: int = 40  # interleaved; fewer where an iteration is long
    seconds: float = 20.0  # at most, per case
    threads: int = 0  # 0: torch's own choice


def repeats_for(config: Config, once: float) -> int:
    """As many repeats as fit into a case's time, within 5 and `repeats`."""
    return max(5, min(config.repeats, int(config.seconds / once)))


# --------------------------------------------------------------------------------------------------- cost of the queue


def fill(queue: Queue) -> None:
    """Put the queue, of stride 1, where 2N − 1 iterations would bring it, with random states: they cost the same."""
    steps, shape = queue.chain.num_steps, (queue.batch, *queue.chain.event_shape)

    def slot(index: int, stage: int) -> Slot:
        turned, held = stage >= steps, 2 * steps - 1 - stage if stage >= steps else stage + 1
        states = {row: torch.randn(shape, device=DEVICE) for row in range(held)}
        carry = {"adjoint": torch.randn(shape, device=DEVICE)} if turned else {}
        return Slot(index, 0, queue.timetable, stage, states, carry)

    queue.slots = [slot(index, 2 * steps - 2 - index) for index in range(2 * steps - 2)]
    queue.injected = 2 * (steps - 1)


def bare_calls(queue: Queue) -> Any:
    """A function that makes one steady iteration's network calls, and nothing else."""
    chain, batch = queue.chain, queue.batch
    running = bool(queue.objective.running)
    kept, every = len(chain.pretrained_rows), chain.num_steps
    t = chain.table.t.to(DEVICE, chain.dtype).repeat_interleave(batch)
    x = torch.randn(every * batch, *chain.event_shape, device=DEVICE)
    split = kept * batch  # u_0 acts on the first samples, u_θ on the others
    frozen = slice(None) if running else slice(0, split)
    cotangent = torch.randn_like(x)

    def calls() -> None:
        with torch.no_grad():
            if kept:
                chain.reference(x[:split], t[:split])
            chain.denoiser(x[split:], t[split:])
        pulled = x[split:].detach().requires_grad_()
        outputs, cotangents = [chain.denoiser(pulled, t[split:])], [cotangent[split:]]
        if running or kept:
            outputs.append(chain.reference(x[frozen].detach().requires_grad_(), t[frozen]))
            cotangents.append(cotangent[frozen])
        torch.autograd.backward(outputs, cotangents)

    return calls


def cost(config: Config, problem: Problem = DIGITS) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for steps, batch in config.cost:
        for kl in (False, True):
            chain = problem.chain(steps)
            adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-9)
            queue = Queue(chain, problem.objective(kl), adam, batch=batch, noise=Noise(0))
            fill(queue)
            calls = bare_calls(queue)

            def update(adam: torch.optim.Adam = adam) -> None:
                adam.step()
                adam.zero_grad()

            start = time.perf_counter()
            queue.step()
            once = time.perf_counter() - start
            with chain.evaluating():
                turns = {"queue": queue.step, "calls": calls, "adam": update}
                times = interleaved(turns, repeats_for(config, 2 * once))
            bare = [c + a for c, a in zip(times["calls"], times["adam"], strict=True)]
            row = {"N": steps, "B": batch, "path_kl": kl, "repeats": len(bare)}
            row |= {f"{name}_ms": median(spent) for name, spent in times.items()}
            rows.append(row | {"ratio": ratio(times["queue"], bare)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------- queue and nested


def throughput(config: Config, problem: Problem = DIGITS) -> list[dict[str, Any]]:
    rows = []
    for steps, batches in config.throughput:
        for batch in batches:
            loops = {}
            for name, kind in (("queue", Queue), ("nested", Nested)):
                chain = problem.chain(steps)
                adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-9)
                loops[name] = kind(chain, problem.objective(), adam, batch=batch, noise=Noise(0))
            fill(loops["queue"])
            start = time.perf_counter()
            loops["nested"].step()
            once = time.perf_counter() - start
            turns = {name: loop.step for name, loop in loops.items()}
            times = interleaved(turns, repeats_for(config, 2 * once), warm_up=1)
            row: dict[str, Any] = {"N": steps, "trajectories_per_update": batch}
            for name, loop in loops.items():
                row[f"{name}_per_second"] = 1e3 / median(times[name])
                row[f"{name}_predicted_bytes"] = predict_memory(loop).total
            rows.append(row | {"times_as_many": ratio(times["nested"], times["queue"])})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


# --------------------------------------------------------------------------------------------------------------- memory


def memory(config: Config) -> list[dict[str, Any]]:
    rows = []
    for steps in config.memory:
        for name in ESTIMATORS:
            command = [sys.executable, __file__, "measure", name, str(steps), str(config.memory_batch)]
            done = subprocess.run(command, capture_output=True, text=True)
            row = {"N": steps, "B": config.memory_batch, "estimator": name}
            failed = {"failed": done.stderr.strip().splitlines()[-1:]}
            rows.append(row | (json.loads(done.stdout) if done.returncode == 0 else failed))
    return rows


def measure(name: str, steps: int, batch: int) -> dict[str, float]:
    """In this process: peak bytes of one gradient above what was held before it, and its seconds.

    On CPUs that is the resident set, whose high-water mark Linux lets a process reset: what the allocator really took,
    fragments included. A first gradient of the same chain cut to two rows has loaded the kernels by then, and its
    freed memory has been given back.
    """
    estimator, goal = ESTIMATORS[name](), DIGITS.objective()
    for n in (2, steps):
        chain = DIGITS.chain(n)
        gc.collect()
        reset_peak()
        before, start = held(), time.perf_counter()
        estimator(chain, goal, Noise(0), batch)
        synchronize()
        seconds, after = time.perf_counter() - start, peak()
    return {"peak_bytes": after - before, "seconds": seconds}


def reset_peak() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def held() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else _status("VmRSS")


def peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


# --------------------------------------------------------------------------------------------------------------- report


def show(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_bytes", " (MB)").replace("_", " "), justify="right")
    for row in rows:
        cells = {name: value / 1e6 if name.endswith("bytes") else value for name, value in row.items()}
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    results: dict[str, Any] = hardware()
    print(", ".join(f"{name} {value}" for name, value in results.items()), flush=True)
    results["config"] = asdict(config)
    for part in config.parts:
        results[part] = globals()[part](config)
        show(part, results[part])
    complete = set(config.parts) == set(Config.parts)
    print("wrote", save("chains" if complete else "chains_" + "_".join(config.parts), results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        import tyro

        main(tyro.cli(Config, description=__doc__))
