"""Memory and handles over many updates: does a run hold more at its end than at its middle?

    python benchmarks/endurance.py             # a table, and results/endurance-*.json; about half an hour on two cores

Every run is tiny and has a process of its own. It trains through `fit`, the first two by their commands, in a folder,
with callbacks, and a checkpoint after every update. A hundred times in a run a last callback counts what the process
holds:

    rss          memory of the process, in bytes
    blocks       pieces of memory that Python has handed out: growth of one number in a list shows here
    objects      that Python's garbage collector follows, except those from before the first update
    tensors      among these, and the bytes of their storages
    descriptors  open files and pipes
    threads
    files        in the folder of the run

What a quarter of a run holds is the median of its counts; the growth is that of the last quarter beyond the second.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
from common import machine, random_weights, save
from torch import Tensor, nn

import implicit_diffusion as idf
from implicit_diffusion import Noise, PathKL, Reward, runs
from implicit_diffusion.gradients import TruncatedBackprop

COUNTED = ("rss", "blocks", "objects", "tensors", "tensor_bytes", "descriptors", "threads", "files")
EXACT = COUNTED[1:]  # rss depends on the allocators too
CHECKPOINT_EVERY = 0.0  # seconds: after every update


@dataclass(frozen=True)
class Config:
    """How many updates each run makes."""

    updates: int = 10_000
    readings: int = 100
    at_once: int = 1
    """Runs at a time, each on one thread."""
    only: tuple[str, ...] = ()
    """Names of runs; all if none is given."""


@dataclass
class Gauge:
    """Callback: counts what the process holds, `readings` times in a run of so many updates."""

    updates: int
    readings: int
    counts: np.ndarray = field(init=False)  # made before the first update: it does not grow

    def __post_init__(self) -> None:
        self.counts, self.process = np.zeros((self.readings, len(COUNTED)), dtype=np.int64), psutil.Process()

    def begin(self, fit: runs.Fit) -> None:
        """Leave out what is there before the first update."""
        gc.collect()
        gc.freeze()

    def __call__(self, fit: runs.Fit) -> None:
        reading, rest = divmod(fit.updates, self.updates // self.readings)
        if not rest:
            assert fit.directory is not None
            self.counts[reading - 1] = self.count(fit.directory.path)

    def count(self, folder: Path) -> tuple[int, ...]:
        """What the process holds now, in the order of `COUNTED`."""
        if "rich.cells" in sys.modules:
            sys.modules["rich.cells"].cached_cell_len.cache_clear()  # of at most 4096 texts, which take long to fill
        gc.collect()
        objects = gc.get_objects()
        tensors = [x for x in objects if issubclass(type(x), Tensor)]
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
        held = len(objects), len(tensors), sum(storages.values())
        del objects, tensors, storages
        files = sum(len(names) for _, _, names in os.walk(folder))
        process = self.process
        return (
            process.memory_info().rss,
            sys.getallocatedblocks(),
            *held,
            process.num_fds(),
            process.num_threads(),
            files,
        )

    def quarter(self, which: int) -> dict[str, float]:
        """What a quarter of the run holds, 0 to 3."""
        first, last = (len(self.counts) * end // 4 for end in (which, which + 1))
        return dict(zip(COUNTED, np.median(self.counts[first:last], axis=0).tolist(), strict=True))


class Denoiser(nn.Module):
    """A small u(x, t) of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def right(x: Tensor) -> Tensor:
    return x[:, 0].tanh()


def over_chains(loop: Callable[..., Any], gauge: Gauge, folder: Path) -> None:
    """A loop over the trajectories of a chain, watched on held-out noise."""
    chain = idf.Chain(Denoiser(), idf.tables.ou_reverse_sde(8, 2.0, "epsilon"), (2,))
    adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-4)
    update = idf.Update(adam, max_grad_norm=1.0, ema_decay=0.99)
    trained = loop(chain, Reward(right) + PathKL(), update, batch=4, noise=Noise(0))
    checks = runs.HeldOut(right, Noise(1), every=10, starts=8)
    callbacks = [checks, *[runs.Runaway(1.0)] * (not trained.unreported), gauge]
    idf.fit(trained, gauge.updates, callbacks=callbacks, directory=folder, checkpoint_every=CHECKPOINT_EVERY)


def over_particles(kernel: Any, gauge: Gauge, folder: Path, **options: Any) -> None:
    """A single loop over particles, under a watch."""
    potential = idf.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    adam = torch.optim.Adam([potential.logits], lr=1e-4)
    loop = idf.Single(potential, kernel, Reward(right), adam, particles=64, noise=Noise(0), **options)
    adapt = [runs.AdaptStep()] * (kernel.target_acceptance is not None)
    callbacks = [*adapt, runs.Watch(every=10), gauge]
    idf.fit(loop, gauge.updates, callbacks=callbacks, directory=folder, checkpoint_every=CHECKPOINT_EVERY)


@contextmanager
def inside(module: Any, gauge: Gauge) -> Iterator[None]:
    """Within the block, the `fit` of a command has the gauge for its last callback, and saves as often as others."""
    fit = module.fit

    def gauged(*arguments: Any, callbacks: list[Any], **options: Any) -> runs.Fit:
        return fit(*arguments, callbacks=[*callbacks, gauge], checkpoint_every=CHECKPOINT_EVERY, **options)

    with mock.patch.object(module, "fit", gauged):
        yield


def ebm(gauge: Gauge, folder: Path) -> None:
    """The command, with weights, an adapted step size, and draws afresh."""
    from implicit_diffusion.commands.ebm import command, training
    from implicit_diffusion.commands.ebm.config import Config

    options = {"particles": 32, "width": 8, "refresh": 100, "judge_steps": 10, "adapt_step": True, "lr": 1e-4}
    with inside(training, gauge):
        command.run(Config(data="moons", steps=gauge.updates, out=folder, **options))


def finetune(gauge: Gauge, folder: Path) -> None:
    """The command on images of 8 by 8 pixels, with a moving average."""
    from implicit_diffusion.commands.finetune import command, training
    from implicit_diffusion.commands.finetune.config import Config

    denoiser, scheduler = random_weights((3, 8, 8), (8, 8))
    model = str(idf.save_pipeline(folder.with_name("model"), denoiser, scheduler, "untrained"))
    options = {"num_steps": 4, "batch": 2, "starts": 8, "kl_weight": 1.0, "lr": 1e-6, "ema": 0.99, "device": "cpu"}
    with inside(training, gauge):
        command.run(Config(model=model, reward="redness", updates=gauge.updates, out=folder, **options))


def on_a_terminal(run: Callable[[Gauge, Path], None], gauge: Gauge, folder: Path) -> None:
    """The run with a progress bar, as rich draws it."""
    with mock.patch.dict(os.environ, FORCE_COLOR="1"):
        run(gauge, folder)


RUNS: dict[str, Callable[[Gauge, Path], None]] = {
    "finetune": finetune,
    "ebm": ebm,
    "queue": partial(over_chains, idf.Queue),
    "queue, truncated at random": partial(over_chains, partial(idf.Queue, estimator=TruncatedBackprop(8, random=True))),
    "nested": partial(over_chains, idf.Nested),
    "single": partial(over_particles, idf.ULA(0.1)),
    "single, weighted": partial(over_particles, idf.MALA(0.1), weighted=True),
    "single, on a terminal": partial(on_a_terminal, partial(over_particles, idf.ULA(0.1))),
    "single, compiled": partial(over_particles, idf.ULA(0.1), compiled=True),
}


def measure(name: str, updates: int, readings: int) -> dict[str, Any]:
    """Make a run, and return what its second and last quarter held, and the growth between them."""
    gauge, start = Gauge(updates, readings), time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            RUNS[name](gauge, Path(folder) / "run")
    finally:
        gc.unfreeze()
    middle, end = gauge.quarter(1), gauge.quarter(3)
    growth = {what: end[what] - middle[what] for what in COUNTED}
    return {"run": name, "seconds": time.perf_counter() - start, "middle": middle, "end": end, "growth": growth}


def in_silence(name: str, updates: int, readings: int) -> dict[str, Any]:
    """The same on one thread, with nothing printed."""
    os.environ |= {"IMPLICIT_DIFFUSION_CACHE": "off", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    return measure(name, updates, readings)


def line(row: dict[str, Any]) -> str:
    middle, end = row["middle"], row["end"]
    shown = [f"{middle['rss'] / 1e6:.1f} → {end['rss'] / 1e6:.1f} MB"]
    shown += [f"{middle[what]:,.0f} → {end[what]:,.0f}" for what in EXACT if what != "tensor_bytes"]
    return f"| {row['run']} | {' | '.join(shown)} | {row['seconds']:.0f} |"


def main(config: Config) -> None:
    """Make the runs, print, write."""
    rows: dict[str, dict[str, Any]] = {}
    heads = ["run", "memory", *(what for what in EXACT if what != "tensor_bytes"), "seconds"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    where = machine()
    with multiprocessing.get_context("spawn").Pool(config.at_once, maxtasksperchild=1) as pool:
        run = partial(in_silence, updates=config.updates, readings=config.readings)
        for row in pool.imap_unordered(run, config.only or RUNS):
            rows[row["run"]] = row
            print(line(row), flush=True)
    if not config.only:
        print("wrote", save("endurance", where | {"updates": config.updates, "rows": [rows[name] for name in RUNS]}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
