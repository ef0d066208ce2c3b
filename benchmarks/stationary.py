"""The single loop on the hexagon: what an iteration costs beside its bare ingredients, and beside a plain program.

    python benchmarks/stationary.py            # a table, and results/stationary-*.json; some minutes on one thread

*Bare* is one forward of the potential, the two pulls that sampler and Γ need, and one normal draw, in one call,
compiled or not. *Plain* is what one would write from the paper: each of the three passes by itself, in eager mode.
Diagnostics are off. All take turns, and ratios are medians of neighbours in time. One thread on the CPU is timed by the
processor's time that it got, to which other processes on the machine add little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import tyro
from common import DEVICE, hardware, interleaved, ratio, save

from implicit_diffusion import ULA, Noise, Reward, Single
from implicit_diffusion.commands.shared.hexagon_problem import hard_reward, mixture
from implicit_diffusion.compiled import SETTINGS
from implicit_diffusion.samplers.draws import innermost

H, LR = 0.2, 0.1


@dataclass(frozen=True)
class Config:
    """The published setting."""

    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    threads: int = 1
    repeats: int = 15
    block: int = 8  # iterations per call of the last arm


def start(n: int) -> torch.Tensor:
    return Noise(0).normal((n, 2), device=DEVICE)


def ours(n: int, **options: Any) -> Callable[[], None]:
    """One `step()` of the library's loop."""
    potential = mixture().to(DEVICE)
    sgd = torch.optim.SGD([potential.logits], lr=LR)
    loop = Single(potential, ULA(H), Reward(hard_reward), sgd, particles=start(n), noise=Noise(0), **options)
    loop.step()
    return lambda: float(loop.step()["reward"])


def bare(n: int, compiled: bool) -> Callable[[], None]:
    """Forward, two pulls and a draw: the least that an iteration can do."""
    potential = mixture().to(DEVICE)
    x, generator = innermost(start(n)), torch.Generator(DEVICE).manual_seed(0)
    charges = torch.randn(n, generator=generator, device=DEVICE) / n

    def passes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        energy = potential(x)
        (force,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
        (gradient,) = torch.autograd.grad(charges @ energy, potential.logits)
        return force, gradient

    function = torch.compile(passes, fullgraph=True, dynamic=False) if compiled else passes
    with torch._dynamo.config.patch(SETTINGS):
        function(x)

    def call() -> None:
        function(x)
        torch.randn(n, 2, generator=generator, device=DEVICE)

    return call


def plain(n: int) -> Callable[[], None]:
    """From the paper, step by step: a sampling step, then a gradient step at the new particles."""
    means = mixture().means.detach().to(DEVICE)
    theta = mixture().logits.detach().clone().to(DEVICE).requires_grad_()
    state, generator = {"x": start(n)}, torch.Generator(DEVICE).manual_seed(0)

    def energy(x: torch.Tensor) -> torch.Tensor:
        squares = ((x[:, None, :] - means) ** 2).sum(-1)
        return -torch.logsumexp(torch.log_softmax(theta, 0) - squares / 2, 1)

    def call() -> None:
        x = state["x"].requires_grad_()
        (force,) = torch.autograd.grad(energy(x).sum(), x)
        xi = torch.randn(n, 2, generator=generator, device=DEVICE)
        x = (x - H * force + math.sqrt(2 * H) * xi).detach()
        reward = hard_reward(x)
        (gradient,) = torch.autograd.grad((energy(x) * (reward - reward.mean())).mean(), theta)
        with torch.no_grad():
            theta.sub_(LR * gradient)
        state["x"] = x
        float(reward.mean())

    return call


def main(config: Config) -> None:
    import torch._dynamo

    torch.set_num_threads(config.threads)
    clock = time.process_time if DEVICE == "cpu" and config.threads == 1 else time.perf_counter
    rows = []
    for n in config.sizes:
        arms: dict[str, tuple[Callable[[], None], int]] = {
            "plain": (plain(n), 1),
            "bare eager": (bare(n, False), 1),
            "ours eager": (ours(n), 1),
            "bare compiled": (bare(n, True), 1),
            "ours compiled": (ours(n, compiled=True), 1),
            f"ours compiled, {config.block} at once": (ours(n, compiled=True, iterations=config.block), config.block),
        }
        calls = max(1, 40_000 // n)

        def several(function: Callable[[], None], count: int, calls: int = calls) -> Callable[[], None]:
            def run() -> None:
                for _ in range(max(1, calls // count)):
                    function()

            return run

        runs = {name: several(f, count) for name, (f, count) in arms.items()}
        times = interleaved(runs, config.repeats, clock=clock)
        each = {name: [1e3 * t / (max(1, calls // c) * c) for t in times[name]] for name, (_, c) in arms.items()}
        last = list(arms)[-1]
        row = {"n": n, "microseconds": {name: median(values) for name, values in each.items()}}
        row["eager / bare eager"] = ratio(each["ours eager"], each["bare eager"])
        row["compiled / bare compiled"] = ratio(each["ours compiled"], each["bare compiled"])
        row["at once / bare compiled"] = ratio(each[last], each["bare compiled"])
        row["plain / compiled"] = ratio(each["plain"], each["ours compiled"])
        row["plain / at once"] = ratio(each["plain"], each[last])
        rows.append(row)
        print(f"n = {n}, microseconds per iteration:")
        print("   ", ", ".join(f"{name} {value:.0f}" for name, value in row["microseconds"].items()))
        print("   ", ", ".join(f"{name} {value:.2f}" for name, value in row.items() if "/" in name), flush=True)
    print("wrote", save("stationary", hardware() | {"rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
