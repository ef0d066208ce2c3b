"""How near the machine's limit training and sampling are: operations, their rate, and the rate of a matrix product.

    python benchmarks/limits.py             # a table, and results/limits-*.json; some minutes

Operations are floating-point multiplications and additions of convolutions and matrix products, counted by torch's
`FlopCounterMode` in one call. The product of two 2048 × 2048 matrices is called in turn with all others, so that the
share compares what the same machine did at the same time. *Best* and median are over the rounds.

queue      one iteration of a full queue, with its update
nested     one step of the nested loop, with its update
plan       evaluation of the pretrained chain: reward and path KL, no gradient
sampling   the chain, no gradient
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from common import BETA, DEVICE, brightness, digits_chain, interleaved, machine, random_weights, save
from torch.utils.flop_counter import FlopCounterMode

from implicit_diffusion import Chain, Nested, Noise, PathKL, Queue, Reward, read_table
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.tables.named import scheduler_for

SIDE = 2048  # of the matrices
SHAPE, WIDTHS = (1, 28, 28), (32, 64, 64)


@dataclass(frozen=True)
class Config:
    """What to measure; the defaults are the published setting."""

    steps: int = 10
    batch: int = 16
    samples: int = 64
    """Of plan and sampling."""
    rounds: int = 7
    problems: tuple[str, ...] = ("digits", "28 x 28")


def chain_of(problem: str, num_steps: int) -> Chain:
    """The chain of the shipped digits, or of an untrained network for larger images."""
    if problem == "digits":
        chain = digits_chain(num_steps)
    else:
        denoiser, scheduler = random_weights(SHAPE, WIDTHS)
        table = read_table(scheduler_for(scheduler, "ddpm", clip=False), num_steps)
        chain = Chain(denoiser.to(DEVICE), table, SHAPE, pretrained_rows="noiseless")
    torch.nn.utils.convert_conv2d_weight_memory_format(chain.denoiser, torch.channels_last)
    return chain


def work_of(config: Config, problem: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the loops are full, and their updates move nothing."""

    def loop(kind: type[Queue] | type[Nested]) -> Queue | Nested:
        chain = chain_of(problem, config.steps)
        adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-9)
        return kind(chain, Reward(brightness) + BETA * PathKL(), adam, batch=config.batch, noise=Noise(0))

    queue, nested, chain = loop(Queue), loop(Nested), chain_of(problem, config.steps)
    while "phase" in queue.step():
        pass
    return {
        "queue": queue.step,
        "nested": nested.step,
        "plan": lambda: evaluate(chain.pretrained(), brightness, Noise(1), starts=config.samples),
        "sampling": lambda: chain.sample(Noise(2), config.samples),
    }


def operations(work: Callable[[], Any]) -> float:
    """Of one call, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def main(config: Config) -> None:
    """Print and keep the table."""
    left, right = torch.randn(2, SIDE, SIDE, device=DEVICE)
    rows: dict[str, dict[str, Any]] = {}
    print("| | GFLOP | ms, best | ms, median | GFLOP/s, best | share of the product's rate, best | median |")
    print("|---|---|---|---|---|---|---|")
    for problem in config.problems:
        works = work_of(config, problem)
        counts = {name: operations(work) for name, work in works.items()} | {"product": 2 * SIDE**3 / 1e9}
        times = interleaved(works | {"product": lambda: left @ right}, config.rounds)
        rates = {name: [1e3 * counts[name] / ms for ms in each] for name, each in times.items()}
        for name, own in rates.items():
            shares = [a / b for a, b in zip(own, rates["product"], strict=True)]
            row = {"gflop": counts[name], "ms": times[name], "share": shares}
            rows[f"{problem}, {name}"] = row
            print(
                f"| {problem}, {name} | {counts[name]:.2f} | {min(times[name]):.0f} | {median(times[name]):.0f} "
                f"| {max(own):.0f} | {max(shares):.2f} | {median(shares):.2f} |",
                flush=True,
            )
    print("wrote", save("limits", {"machine": machine(), "config": config.__dict__, "rows": rows}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
