"""The queue beside the nested loop on an accelerator: a U-Net of CIFAR's size, N = 50, bfloat16, compiled.

    python benchmarks/accelerator.py                       # benchmarks/results/accelerator-<hardware>.json
    python benchmarks/accelerator.py --model runs/pretrain-cifar10/model --seconds 600
    python benchmarks/accelerator.py --smoke               # the same path anywhere, tiny, in float32; writes nothing

The network is the one that `pretrain` builds for colour images of 32 × 32, untrained unless a folder is given: speed
and memory are the same, J is then that of a sampler of noise. The reward is `redness`, β its deviation under u_0.

cost        an iteration of the full queue beside the bare network calls that it needs, as in chains.py
throughput  updates per second at the same number of trajectories per update, as in chains.py
peaks       peak memory of one update of either loop, above the networks and the optimizer's moments
target      seconds to 90 % of the way to the best J of any run, each loop at its best rate, as in time_to_target.py

Networks are compiled before anything is measured.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import chains
import time_to_target
import torch
from common import DEVICE, Problem, machine, random_weights, save

from implicit_diffusion import Chain, Nested, Noise, Queue, evaluate, load_pretrained, read_table
from implicit_diffusion.commands.finetune.problem.precision import check_precision, networks_of
from implicit_diffusion.commands.rewards.shipped import redness
from implicit_diffusion.compiled import Compiled
from implicit_diffusion.frozen import frozen_copy
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.tables import scheduler_for

LOOPS = {"queue": Queue, "nested": Nested}


@dataclass(frozen=True)
class Config:
    """What to measure; the defaults are the setting to publish."""

    model: str | None = None  # a folder of a pretrained unconditional model of colour images
    size: int = 32
    channels: tuple[int, ...] | None = None  # widths of the U-Net; by default those of `pretrain`
    num_steps: int = 50
    batches: tuple[int, ...] = (1, 4, 16)  # trajectories per update
    precision: Literal["float32", "bf16", "fp16"] = "bf16"
    compile: bool = True
    repeats: int = 40
    case_seconds: float = 30.0  # at most, of each case of cost and throughput
    target_batch: int = 4
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    seconds: float = 120.0  # of training, per run of target
    points: int = 24
    held_out: int = 256
    seeds: int = 3
    smoke: bool = False


SMOKE: dict[str, Any] = {
    "size": 8,
    "channels": (8, 8),
    "num_steps": 3,
    "batches": (2,),
    "precision": "float32",
    "compile": False,
    "repeats": 5,
    "case_seconds": 1.0,
    "target_batch": 2,
    "rates": (1e-3,),
    "seconds": 1.0,
    "points": 2,
    "held_out": 16,
    "seeds": 1,
}


def problem(config: Config) -> tuple[Problem, dict[str, Any]]:
    """Redness of the chain, and what the network is. All chains share one network, which is compiled once."""
    if config.model is None:
        denoiser, scheduler = random_weights((3, config.size, config.size), config.channels)
        shape: tuple[int, ...] = (3, config.size, config.size)
    else:
        pretrained = load_pretrained(config.model)
        denoiser, scheduler, shape = pretrained.denoiser, pretrained.scheduler, pretrained.event_shape
    denoiser.precision = check_precision(config.precision, torch.device(DEVICE))
    torch.nn.utils.convert_conv2d_weight_memory_format(denoiser.to(DEVICE), torch.channels_last)
    reference, scheduler = frozen_copy(denoiser), scheduler_for(scheduler, "ddpm", clip=False)

    def chain(num_steps: int) -> Chain:
        denoiser.load_state_dict(reference.state_dict())
        table = read_table(scheduler, num_steps)
        return Chain(denoiser, table, shape, reference=reference, pretrained_rows="noiseless")

    made = chain(config.num_steps)
    facts = {"parameters": sum(p.numel() for p in denoiser.parameters()), "pretrained": config.model is not None}
    for network in networks_of(made) if config.compile else ():
        network.compiled = Compiled(network.model, differentiates=False, dynamic=None)
    facts |= {"event_shape": shape, "compiled": config.compile}
    spread = evaluate(made, redness, Noise(0).stream(2), starts=config.held_out).reward.std().item()
    return Problem(chain, redness, beta=spread, deviation=spread), facts | {"beta": spread}


def loops(config: Config, problem: Problem, batch: int) -> dict[str, Callable[[], Any]]:
    """How to build either loop, at rest: an optimizer whose rate moves nothing."""

    def build(kind: Any) -> Any:
        chain = problem.chain(config.num_steps)
        adam = torch.optim.Adam(chain.denoiser.parameters(), lr=1e-9)
        return kind(chain, problem.objective(), adam, batch=batch, noise=Noise(0))

    return {name: lambda kind=kind: build(kind) for name, kind in LOOPS.items()}


def warm_up(config: Config, problem: Problem) -> None:
    """Both loops from their first to their steady iterations, so that code for every shape of a batch is there."""
    for batch in {*config.batches, config.target_batch}:
        for name, build in loops(config, problem, batch).items():
            loop = build()
            for _ in range(2 * config.num_steps if name == "queue" else 1):
                loop.step()


def peaks(config: Config, problem: Problem) -> list[dict[str, Any]]:
    rows = []
    for batch in config.batches:
        row: dict[str, Any] = {"N": config.num_steps, "B": batch}
        for name, build in loops(config, problem, batch).items():
            loop = build()
            arrange: Callable[[], Any] = partial(chains.fill, loop) if isinstance(loop, Queue) else lambda: None
            arrange()
            loop.step()  # Adam has its moments now
            if isinstance(loop, Queue):
                loop.slots.clear()
            gc.collect()
            chains.reset_peak()
            before = chains.held()
            arrange()
            loop.step()
            row |= {f"{name}_peak_bytes": chains.peak() - before}
            memory = predict_memory(loop)
            row |= {f"{name}_predicted_bytes": memory.states + memory.activations}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def target(config: Config, problem: Problem) -> dict[str, Any]:
    setting = {name: getattr(config, name) for name in ("num_steps", "rates", "seconds", "points", "held_out", "seeds")}
    return time_to_target.run(time_to_target.Config(batches=(config.target_batch,), **setting), problem)


def main(config: Config) -> None:
    if config.smoke:
        config = replace(config, **SMOKE)
    elif DEVICE == "cpu":
        sys.exit("this benchmark is for an accelerator, and there is none; --smoke tries its path")
    trained, facts = problem(config)
    results: dict[str, Any] = machine() | facts
    print(", ".join(f"{name} {value}" for name, value in results.items()), flush=True)
    results["config"] = asdict(config)
    warm_up(config, trained)
    cases = chains.Config(
        cost=tuple((config.num_steps, batch) for batch in config.batches),
        throughput=((config.num_steps, config.batches),),
        repeats=config.repeats,
        seconds=config.case_seconds,
    )
    results["cost"], results["throughput"] = chains.cost(cases, trained), chains.throughput(cases, trained)
    results["peaks"] = peaks(config, trained)
    for part in ("cost", "throughput", "peaks"):
        chains.show(part, results[part])
    results["target"] = target(config, trained)
    for run in results["target"]["runs"]:
        took = run["seconds_to_target"]
        print(f"{run['loop']}, seed {run['seed']}:", "not reached" if took is None else f"{took:.1f} s to the target")
    if not config.smoke:
        print("wrote", save("accelerator", results))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
