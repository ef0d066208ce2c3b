"""Seeds at once: what `implicit-diffusion hexagon` takes for one seed and for several.

    python benchmarks/seeds.py              # results/seeds-*.json; five minutes

Every run is a process of its own on one thread, at the defaults, and compiles everything: the compiler has an empty
cache. Processor seconds depend less on what else the machine does.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from common import machine, save


@dataclass(frozen=True)
class Config:
    """What to measure; the defaults are the published setting."""

    seeds: tuple[int, ...] = (1, 2, 10)


def measure(seeds: int) -> dict[str, float]:
    """Seconds of the clock and of the processor for a run."""

    def processor() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, began = processor(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
        run = [sys.executable, "-m", "implicit_diffusion", "hexagon", "--seeds", str(seeds), "--out", f"{folder}/run"]
        subprocess.run(run, check=True, capture_output=True, env=env)
    return {"seconds": time.perf_counter() - began, "processor_seconds": processor() - before}


def main(config: Config) -> None:
    """Print and keep the table."""
    print("| seeds | seconds | processor seconds | of one seed's |\n|---|---|---|---|")
    rows: dict[int, dict[str, float]] = {}
    for seeds in config.seeds:
        rows[seeds] = measure(seeds)
        clock, processor = rows[seeds].values()
        ratio = processor / rows[config.seeds[0]]["processor_seconds"]
        print(f"| {seeds} | {clock:.0f} | {processor:.0f} | {ratio:.1f} |", flush=True)
    print("wrote", save("seeds", {"machine": machine(), "seeds": {str(seeds): row for seeds, row in rows.items()}}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
