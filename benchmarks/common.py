"""What the benchmarks share: the problem that is trained, the machine's name, and where results go."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion import Chain, PathKL, Reward, read_table
from implicit_diffusion.commands.rewards.shipped import brightness
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.digits import EVENT_SHAPE
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.objectives import Objective
from implicit_diffusion.tables.named import scheduler_for

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
ASSET = ROOT / "src" / "implicit_diffusion" / "digits" / "assets" / "digits"
BETA = 2.6  # KL weight of the demo
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def digits_chain(num_steps: int) -> Chain:
    """The shipped digits model under DDPM with trailing spacing, pretrained on the row without noise."""
    if ASSET.exists():
        pretrained = load_pretrained("digits")
        denoiser, scheduler = pretrained.denoiser, pretrained.scheduler
    else:  # its architecture: the same cost
        denoiser, scheduler = random_weights(EVENT_SHAPE)
    table = read_table(scheduler_for(scheduler, "ddpm", clip=False), num_steps)
    return Chain(denoiser.to(DEVICE), table, EVENT_SHAPE, pretrained_rows="noiseless")


def random_weights(event_shape: tuple[int, int, int], channels: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    """The network that `pretrain` would train for such images, untrained, and its scheduler."""
    from implicit_diffusion.commands.pretrain.config import Config
    from implicit_diffusion.commands.pretrain.network import Network, widths_for

    default = Config()
    network = Network(
        event_shape=event_shape,
        widths=channels or widths_for(*event_shape[1:]),
        classes=0,
        dropout=default.dropout,
        train_timesteps=default.train_timesteps,
        beta_schedule=default.beta_schedule,
        prediction_type=default.prediction_type,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, scheduler = network.build()
    return DiffusersDenoiser(unet.eval()), scheduler


@dataclass(frozen=True)
class Problem:
    """What is trained: a chain of so many rows, for a reward.

    Args:
        chain: from the number of rows, on `DEVICE`, with the pretrained weights.
        reward: of its samples.
        beta: weight of the path KL.
        deviation: of the pretrained reward, to which the norm of Γ is clipped as in `finetune`.
    """

    chain: Callable[[int], Chain]
    reward: Callable[..., Tensor]
    beta: float
    deviation: float

    def objective(self, kl: bool = True) -> Objective:
        """The reward, with the path KL or without any."""
        return Reward(self.reward) + self.beta * PathKL() if kl else Reward(self.reward)


DIGITS = Problem(digits_chain, brightness, BETA, deviation=2.7)


def milliseconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """One call, with the device's queue emptied before and after."""
    synchronize()
    start = clock()
    function()
    synchronize()
    return 1e3 * (clock() - start)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def interleaved(
    functions: dict[str, Callable[[], Any]],
    repeats: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every function, called in turn, so that a busy moment of the machine strikes all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(warm_up + repeats):
        for name, function in functions.items():
            spent = milliseconds(function, clock)
            if repeat >= warm_up:
                times[name].append(spent)
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios of neighbours in time."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was when the benchmark began."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    elif info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = found[1]
    load = os.getloadavg()[0]
    return {
        "hardware": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_at_start": round(load, 2),
        "idle": load < 0.5,
    }


def hardware() -> dict[str, Any]:
    """The machine, and the digits model."""
    return machine() | {
        "parameters": sum(p.numel() for p in digits_chain(2).denoiser.parameters()),
        "pretrained": ASSET.exists(),
    }


def save(name: str, results: dict[str, Any]) -> Path:
    """Write benchmarks/results/<name>-<hardware>.json."""
    RESULTS.mkdir(exist_ok=True)
    slug = "cpu" if DEVICE == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    path = RESULTS / f"{name}-{slug}.json"
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return path
