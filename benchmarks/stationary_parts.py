"""Where the cost of a compiled iteration of the hexagon goes: a ladder from the bare passes to the library's step.

    python benchmarks/stationary_parts.py      # a table; a minute on one thread

Every rung is compiled in one piece and makes one iteration per call, beside the draw of its normal numbers; processor
time, in turns. What lies between the last rung and `step()` is Python: guards, keys of the noise, metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import tyro
from common import interleaved, ratio
from stationary import H, ours, start

from implicit_diffusion.commands.shared.hexagon_problem import hard_reward, mixture
from implicit_diffusion.compiled import SETTINGS
from implicit_diffusion.samplers.draws import innermost

RUNGS = ("forward, two pulls, draw", "+ reward and centring", "+ Langevin step")


@dataclass(frozen=True)
class Config:
    """The published setting."""

    sizes: tuple[int, ...] = (10_000, 100_000)
    repeats: int = 25


def rung(n: int, height: int) -> Callable[[], None]:
    """The passes with as much of an iteration as `height` says, and a draw."""
    potential, x, h = mixture(), innermost(start(n)), torch.tensor(H)
    generator = torch.Generator().manual_seed(0)
    fixed = torch.randn(n, generator=generator) / n

    def passes(x: torch.Tensor, xi: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.detach().requires_grad_()
        energy = potential(x)
        (force,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
        charges, rewards = fixed, fixed
        if height > 0:
            rewards = hard_reward(x.detach())
            charges = (rewards - rewards.mean()) / (n - 1)
        (gradient,) = torch.autograd.grad(charges @ energy, potential.logits)
        out = x.detach() - h * force + (2 * h).sqrt() * xi if height > 1 else force
        return (out, gradient, rewards.mean()) if height > 0 else (out, gradient)

    function = torch.compile(passes, fullgraph=True, dynamic=False)

    def call() -> None:
        function(x, torch.randn((2, n), generator=generator).mT)

    with torch._dynamo.config.patch(SETTINGS):
        call()
    return call


def main(config: Config) -> None:
    import torch._dynamo

    torch.set_num_threads(1)
    for n in config.sizes:
        calls = max(8, 40_000 // n)
        arms = {name: rung(n, height) for height, name in enumerate(RUNGS)} | {"step()": ours(n, compiled=True)}

        def several(function: Callable[[], None], calls: int = calls) -> Callable[[], None]:
            def run() -> None:
                for _ in range(calls):
                    function()

            return run

        times = interleaved({name: several(f) for name, f in arms.items()}, config.repeats, clock=time.process_time)
        print(f"n = {n}, microseconds per iteration, and over the first:")
        for name, values in times.items():
            print(f"    {name:26s}{1e3 * median(values) / calls:7.0f}{ratio(values, times[RUNGS[0]]):7.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
