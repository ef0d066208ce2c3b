"""How long threads wait for each other: an update of the digits on cores that are idle, and on cores that are taken.

    python benchmarks/waiting.py            # a table, and results/waiting-*.json; three minutes

The threads of a convolution wait for the slowest one. One that spins while it waits is there at once when work comes,
and keeps the core from the one that it waits for where another program wants that core as well; one that sleeps has to
be woken. `GOMP_SPINCOUNT` is how often libgomp looks before it sleeps; `implicit-diffusion` sets it to 10000 unless it,
or `OMP_WAIT_POLICY`, is set already. The cores are taken by as many processes that do nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
from common import BETA, brightness, digits_chain, machine, save

from implicit_diffusion import Noise, PathKL, Queue, Reward
from implicit_diffusion.__main__ import SPINS

SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "libgomp's own": {},
    f"{SPINS} turns": {"GOMP_SPINCOUNT": SPINS},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}


@dataclass(frozen=True)
class Config:
    """What to measure; the defaults are the published setting."""

    updates: int = 8
    repeats: int = 3
    child: bool = False
    """Measure in this process and print the seconds of an update."""


def seconds(updates: int) -> float:
    """Of one iteration of a full queue, the median."""
    chain = digits_chain(10)
    torch.nn.utils.convert_conv2d_weight_memory_format(chain.denoiser, torch.channels_last)
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-4)
    loop = Queue(chain, Reward(brightness) + BETA * PathKL(), adam, batch=16, noise=Noise(0))
    times = []
    while len(times) < updates:
        began = time.perf_counter()
        if "phase" not in loop.step():
            times.append(time.perf_counter() - began)
    return median(times)


def measure(setting: dict[str, str], updates: int, busy: int) -> float:
    """The same in a process with this environment, beside `busy` others."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        call = [sys.executable, __file__, "--child", "--updates", str(updates)]
        return float(subprocess.run(call, env=own | setting, check=True, capture_output=True, text=True).stdout)
    finally:
        for other in others:
            other.kill()


def main(config: Config) -> None:
    """Print and keep the table."""
    if config.child:
        print(seconds(config.updates))
        return
    cores, rows = os.cpu_count() or 1, {}
    print(f"| threads that wait | {cores} idle cores | {cores} busy cores |\n|---|---|---|")
    for name, setting in SETTINGS.items():
        rows[name] = {
            state: [measure(setting, config.updates, busy) for _ in range(config.repeats)]
            for state, busy in (("idle", 0), ("busy", cores))
        }
        cells = (f"{median(times):.2f} s ({min(times):.2f} to {max(times):.2f})" for times in rows[name].values())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print("wrote", save("waiting", {"machine": machine(), "seconds_per_update": rows}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
