"""One run over several processes: seconds per update, and what the processes send each other.

    python benchmarks/scaling.py               # tables, and benchmarks/results/scaling-*.json; some minutes

weak     the share of each process stays the same, the whole grows with their number
strong   the whole stays the same, and is shared out

Each process computes on one thread; one process is started in the same way as two. An update's calls of
`torch.distributed` and the bytes that a process hands to them are counted by `processes.traffic`, in a steady state;
they do not depend on the machine. *Efficiency* is the time that a perfect division of the work would take, over the
time that was measured: weak T(1)/T(W), strong T(1)/(W·T(W)).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import DIGITS, machine, save
from torch import nn

from implicit_diffusion import MMD, ULA, Nested, Noise, Queue, Single, processes
from implicit_diffusion.objectives import ForwardKL

SIDE = 16  # of the images of the energy network


@dataclass(frozen=True)
class Config:
    """What to measure; the defaults are the published setting."""

    world_sizes: tuple[int, ...] = (1, 2)
    batch: int = 16  # of one process, and of all in strong scaling
    particles: int = 256  # likewise
    steps: int = 10  # N
    updates: int = 30
    warm: int = 25  # iterations before: a queue of 10 rows is full after 20


def queue(config: Config, total: int) -> Callable[[], Any]:
    chain = DIGITS.chain(config.steps)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-9)
    return Queue(chain, DIGITS.objective(), adam, batch=total * config.batch, noise=Noise(0)).step


def nested(config: Config, total: int) -> Callable[[], Any]:
    chain = DIGITS.chain(config.steps)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-9)
    return Nested(chain, DIGITS.objective(), adam, batch=total * config.batch, noise=Noise(0)).step


def nested_mmd(config: Config, total: int) -> Callable[[], Any]:
    """An objective that needs all samples at once."""
    chain = DIGITS.chain(config.steps)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-9)
    data = Noise(1).normal((256, *chain.event_shape), 0)
    return Nested(chain, MMD(data), adam, batch=total * config.batch, noise=Noise(0)).step


class EnergyNetwork(nn.Module):
    """V(x) = ‖x‖²/2 + a small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.SiLU()),
            *(nn.Conv2d(64, 64, 3, 2, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64 * (SIDE // 4) ** 2, 1)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().flatten(1).sum(1) / 2 + self.layers(x)[:, 0]


def single(config: Config, total: int, weighted: bool = False) -> Callable[[], Any]:
    potential, n = EnergyNetwork(), total * config.particles
    data = Noise(1).normal((1024, 1, SIDE, SIDE), 0)
    adam = torch.optim.Adam(potential.parameters(), lr=1e-6)
    objective, particles = ForwardKL(data, batch=n), Noise(2).normal((n, 1, SIDE, SIDE), 0)
    return Single(potential, ULA(1e-3), objective, adam, particles=particles, noise=Noise(0), weighted=weighted).step


def single_weighted(config: Config, total: int) -> Callable[[], Any]:
    return single(config, total, weighted=True)


PROBLEMS = {f.__name__: f for f in (queue, nested, nested_mmd, single, single_weighted)}


def worker(name: str, total: int, config: Config) -> None:
    """Measure in one of the processes that torchrun has started; the main one prints."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    step = PROBLEMS[name](config, total)
    for _ in range(config.warm):
        step()
    before, seconds = (processes.traffic.calls, processes.traffic.bytes), []
    for _ in range(config.updates):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    calls, size = processes.traffic.calls - before[0], processes.traffic.bytes - before[1]
    if processes.is_main():
        row = {"seconds": median(seconds), "calls": calls / config.updates, "bytes": size / config.updates}
        print("RESULT", json.dumps(row), flush=True)
    dist.destroy_process_group()


def measured(name: str, world_size: int, total: int, config: Config) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    arguments = [str(Path(__file__)), "worker", name, str(total), json.dumps(asdict(config))]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def scaling(name: str, config: Config) -> list[dict[str, Any]]:
    """Weak and strong scaling of one problem; totals are multiples of the largest number of processes."""
    most, rows = max(config.world_sizes), []
    for kind in ("weak", "strong"):
        for world_size in config.world_sizes:
            total = world_size if kind == "weak" else most
            row = measured(name, world_size, total, config)
            first = rows[-1] if rows and rows[-1]["kind"] == kind else None
            ideal = row["seconds"] if first is None else first["one"] / (1 if kind == "weak" else world_size)
            one = row["seconds"] if first is None else first["one"]
            efficiency = ideal / row["seconds"]
            rows.append({"problem": name, "kind": kind, "W": world_size, "efficiency": efficiency, "one": one} | row)
    return rows


def main(config: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    results: dict[str, Any] = machine() | {"threads": 1, "config": asdict(config), "rows": []}
    for name in PROBLEMS:
        rows = scaling(name, config)
        table = Table(title=name)
        for head in ("scaling", "W", "ms per update", "efficiency", "calls", "kB sent per update"):
            table.add_column(head, justify="right")
        for row in rows:
            numbers = f"{1e3 * row['seconds']:.1f}", f"{row['efficiency']:.2f}", f"{row['calls']:.1f}"
            table.add_row(row["kind"], str(row["W"]), *numbers, f"{row['bytes'] / 1e3:.1f}")
        Console(width=None if sys.stdout.isatty() else 100).print(table)
        results["rows"] += [{key: value for key, value in row.items() if key != "one"} for row in rows]
    print("wrote", save("scaling", results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], int(sys.argv[3]), Config(**json.loads(sys.argv[4])))
    else:
        import tyro

        main(tyro.cli(Config, description=__doc__))
