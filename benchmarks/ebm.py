"""Training an energy-based model with one Langevin step per update, beside torchebm's contrastive divergence.

    python benchmarks/ebm.py            # tables, and results/ebm-*.json; some minutes on one idle thread
    python benchmarks/ebm.py --quick    # the same without compilation, and with numbers that mean nothing

The same network with the same initial weights, the same standardised data and batch, the same h, Adam, thread; k = 1.
*Ours* is `Single`: one forward and one backward pass at particles and data serve sampler and Γ. *Theirs* moves the
particles (a forward and a backward), then takes its loss at data and particles (two forwards, one backward). *Ours,
weighted* moves its particles by HMC; *theirs, HMC* has torchebm's at the same step size, to tell HMC from weights.

Two questions: what an iteration costs, and when the exact KL(data‖model), by quadrature, first stays below a target.
Each side runs in a process of its own, one at a time and in turns; clocks stop while the KL is computed. Each arm has
the best learning rate of one grid, found on a seed of its own.

What was set so that both do the same, and costs torchebm nothing:

- its defaults that change the objective are off: energy regularisation (`energy_reg_weight`), noise on data;
- persistent chains: a buffer of exactly n, begun at N(0, I) like ours, without warm-up and new noise; its defaults,
  10 000 points near 0, would move a particle at one update in many. "theirs, from data" is plain CD;
- its `LangevinDynamics` with noise_scale = 1 is x − h∇V + √(2h) ξ, our ULA (checked here);
- its `ContrastiveDivergenceTrainer` raises TypeError in 0.8.9 (it hands `use_mixed_precision` to a loss that knows no
  such argument). Its loop is written out, without the two further forwards that it makes for metrics;
- batches are drawn with one generator, without a DataLoader, which would be slower.

Compiled: `Single(compiled=True)` is one graph with the optimizer. torchebm has no switch; three ways are tried: its potential
for all calls; its potential for those of the loss alone, since a compiled potential pulls back to θ even where
only ∇_x is asked for; and its loss with the sampler inside, as far as torch can trace it.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from statistics import geometric_mean, median
from typing import Any

import torch
import tyro
from common import machine, milliseconds, ratio, save
from torch import Tensor, nn

from implicit_diffusion import HMC, ULA, ForwardKL, Noise, Single, Tilted
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.experiments.ebm_data import Data, load
from implicit_diffusion.experiments.energy_model import Architecture
from implicit_diffusion.experiments.planar import Quadrature

H = 0.01  # of Langevin, both sides
WEIGHTED = HMC(0.06, leapfrogs=4)  # of our weighted arm: the default of `implicit-diffusion ebm`
NETWORK, TRAIN = range(1, 3)  # streams of noise
EAGER = ("theirs", "theirs, from data", "theirs, HMC", "ours", "ours, weighted")
COMPILED = ("theirs, potential compiled", "theirs, its loss's compiled", "theirs, loss compiled", "ours, compiled")
LANGEVIN = ("theirs", "theirs, from data")  # what `ours` is compared with
PASSES = {  # points through the network per iteration, forward and back, as multiples of n
    "theirs": (3, 3),
    "theirs, from data": (3, 3),
    "ours": (2, 2),
    "ours, weighted": (6, 8),  # two pulls at particles and data together, and four leapfrogs
}


@dataclass(frozen=True)
class Config:
    """The setting."""

    law: str = "moons"
    sizes: tuple[int, ...] = (256, 1000)
    """n of the first table: particles, and data per update."""
    particles: int = 256
    """n of the second table."""
    width: int = 64
    rounds: int = 15
    """Blocks per arm, in turns."""
    block: int = 20
    """Iterations per block."""
    targets: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1)
    """KL in nats."""
    grid: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates."""
    budget: float = 6.0
    """Seconds of training per run."""
    seeds: int = 3
    threads: int = 1
    quick: bool = False
    """A smoke run."""

    def effective(self) -> Config:
        if not self.quick:
            return self
        short = replace(self, sizes=(64,), particles=64, rounds=2, block=3, budget=0.3)
        return replace(short, targets=(2.0,), grid=(1e-3,), seeds=1)


@dataclass(frozen=True)
class Training:
    """One side's training: `step` is an iteration, `potential` what it trains."""

    step: Callable[[], Any]
    potential: Tilted


@cache
def data_of(law: str) -> Data:
    return load(law, Noise(0))


def network(config: Config, seed: int) -> Tilted:
    return Architecture("mlp", (2,), config.width).build(Noise(seed).stream(NETWORK))


def adam(potential: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(potential.parameters(), lr=lr, betas=(0.9, 0.99))


def ours(config: Config, arm: str, n: int, lr: float, seed: int) -> Training:
    """The single loop of the library."""
    potential, weighted = network(config, seed), "weighted" in arm
    loop = Single(
        potential,
        WEIGHTED if weighted else ULA(H),
        ForwardKL(data_of(config.law).standardised()[0], batch=n),
        adam(potential, lr),
        particles=n,  # drawn from N(0, I), which is π_θ at the start
        noise=Noise(seed).stream(TRAIN),
        weighted=weighted,
        compiled="compiled" in arm,
    )
    return Training(loop.step, potential)


def theirs(config: Config, arm: str, n: int, lr: float, seed: int) -> Training:
    """The training loop of torchebm."""
    from torchebm.core import BaseModel
    from torchebm.losses import ContrastiveDivergence
    from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics

    class Model(BaseModel):  # type: ignore[misc]
        """torchebm's contract around a potential."""

        def __init__(self, potential: Callable[[Tensor], Tensor]) -> None:
            super().__init__(device="cpu")
            self.potential = potential

        def forward(self, x: Tensor) -> Tensor:
            return self.potential(x)

    potential = network(config, seed)
    function = torch.compile(potential, dynamic=False) if arm in COMPILED[:2] else potential
    sampled = Model(function if arm == COMPILED[0] else potential)
    sampler = LangevinDynamics(sampled, step_size=H, noise_scale=1.0, device="cpu")
    if "HMC" in arm:
        step_size, leapfrogs = WEIGHTED.step(0), WEIGHTED.leapfrogs
        sampler = HamiltonianMonteCarlo(sampled, step_size=step_size, n_leapfrog_steps=leapfrogs, device="cpu")
    loss_of = ContrastiveDivergence(
        Model(function),
        sampler,
        k_steps=1,
        persistent="from data" not in arm,
        buffer_size=n,
        init_steps=0,
        new_sample_ratio=0.0,
        energy_reg_weight=0.0,
        add_noise_to_real=False,
    )
    generator = Noise(seed).stream(TRAIN).generator(0)
    loss_of.initialize_buffer((2,), init_noise_scale=1.0, generator=generator)
    data, optimizer = data_of(config.law).standardised()[0], adam(potential, lr)
    evaluate = torch.compile(loss_of, dynamic=False) if arm == COMPILED[2] else loss_of

    def step() -> None:
        batch = data[torch.randint(len(data), (n,), generator=generator)]
        optimizer.zero_grad(set_to_none=True)
        loss, _ = evaluate(batch, generator=generator)
        loss.backward()
        optimizer.step()

    return Training(step, potential)


def make(config: Config, arm: str, n: int, lr: float = 1e-3, seed: int = 0) -> Training:
    torch.set_num_threads(config.threads)
    return (ours if arm.startswith("ours") else theirs)(config, arm, n, lr, seed)


# ---- what runs in the processes


@contextmanager
def counted(potential: Tilted) -> Iterator[list[int]]:
    """Counts points that pass the network forward, and back."""
    points = [0, 0]

    def forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
        points[0] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: points.__setitem__(1, points[1] + len(gradient)))

    handle = potential.network.register_forward_hook(forward)
    try:
        yield points
    finally:
        handle.remove()


def facts(config: Config, arm: str, n: int) -> dict[str, Any]:
    """The initial weights, and the points through the network per iteration."""
    training = make(config, arm, n)
    weights = b"".join(p.detach().numpy().tobytes() for p in training.potential.parameters())
    training.step()
    with counted(training.potential) as points:
        training.step()
    return {"weights": hashlib.sha256(weights).hexdigest(), "passes": (points[0] / n, points[1] / n)}


def check_step(config: Config, arm: str) -> None:
    """torchebm's Langevin step is our ULA."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Double(BaseModel):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return (x.square() - 1).square().sum(1)

    x = Noise(0).normal((100, 2))
    sampler = LangevinDynamics(Double(device="cpu"), step_size=H, noise_scale=1.0, device="cpu")
    got = sampler.sample(x=x, n_steps=1, generator=torch.Generator().manual_seed(0))
    xi = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, x - H * 4 * x * (x.square() - 1) + math.sqrt(2 * H) * xi)


@cache
def prepared(config: Config, arm: str, n: int) -> Callable[[], None]:
    training = make(config, arm, n)
    for _ in range(3):  # compilation, and the optimizer's state
        training.step()

    def block() -> None:
        for _ in range(config.block):
            training.step()

    return block


def microseconds(config: Config, arm: str, n: int) -> float:
    """Of an iteration, over a block."""
    return 1e3 * milliseconds(prepared(config, arm, n)) / config.block


def curve(config: Config, arm: str, lr: float, seed: int) -> list[dict[str, float]]:
    """Exact KL at instants of training a tenth apart; ends with the budget, or once all targets are met.

    Also ends where our loop refuses to go on with NaN or infinity.
    """
    data = data_of(config.law)
    quadrature = Quadrature(data.shift, data.scale, data.law)
    training = make(config, arm, config.particles, lr, seed)
    seconds, updates, look, points = 0.0, 0, config.budget / 50, []
    while seconds < config.budget:
        start = time.perf_counter()
        while (now := seconds + time.perf_counter() - start) < look:
            try:
                training.step()
            except NonFiniteError:
                return points
            updates += 1
        seconds, look = now, 1.12 * now
        kl = quadrature.figures(training.potential)["kl"]
        points.append({"seconds": seconds, "updates": updates, "kl": kl})
        if all(reached(points, target) is not None for target in config.targets):
            break
    return points


# ---- what runs here


def reached(points: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first of three looks in a row at which the KL is below the target."""
    for three in zip(points, points[1:], points[2:]):
        if all(point["kl"] <= target for point in three):
            return three[0]
    return None


def iteration_table(config: Config, call: Callable[..., Any]) -> list[dict[str, Any]]:
    """Time per iteration of all arms, in turns."""
    rows = []
    arms = EAGER if config.quick else EAGER + COMPILED
    for n in config.sizes:
        known = {arm: call(facts, config, arm, n) for arm in EAGER}
        assert len({found["weights"] for found in known.values()}) == 1, "initial weights differ"
        for arm, passes in PASSES.items():
            assert known[arm]["passes"] == passes, f"{arm}: {known[arm]['passes']} in place of {passes}"
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat in range(1 + config.rounds):
            for arm in arms:
                spent = call(microseconds, config, arm, n)
                if repeat:
                    times[arm].append(spent)
        row: dict[str, Any] = {"n": n, "microseconds": {arm: median(values) for arm, values in times.items()}}
        row["passes"] = {arm: found["passes"] for arm, found in known.items()}
        row["ours / theirs"] = ratio(times["ours"], times["theirs"])
        row["ours / theirs, from data"] = ratio(times["ours"], times["theirs, from data"])
        if not config.quick:
            best = row["their quickest"] = min(("theirs", *COMPILED[:3]), key=lambda arm: median(times[arm]))
            row["ours, compiled / their quickest"] = ratio(times["ours, compiled"], times[best])
        rows.append(row)
        print(f"n = {n}, microseconds per iteration (n points through the network forward, back):")
        for arm, value in row["microseconds"].items():
            passes = "   {:g}, {:g}".format(*row["passes"][arm]) if arm in row["passes"] else ""
            print(f"    {arm:28s} {value:8.0f}{passes}")
        print("   ", "; ".join(f"{name} {value:.2f}" for name, value in row.items() if "/" in name), flush=True)
    return rows


def time_table(config: Config, call: Callable[..., Any]) -> dict[str, Any]:
    """Seconds to the targets, for every arm at its best rate."""
    arms: dict[str, Any] = {}
    for arm in EAGER:
        tried = {lr: call(curve, config, arm, lr, 1000) for lr in config.grid}
        best = min(config.grid, key=lambda lr: badness(tried[lr], config))
        runs = [call(curve, config, arm, best, seed) for seed in range(config.seeds)]
        found = {f"{target:g}": [reached(points, target) for points in runs] for target in config.targets}
        arms[arm] = {
            "lr": best,
            "grid": {f"{lr:g}": summary(points, config) for lr, points in tried.items()},
            "reached": found,
            "seconds": {target: middle(points, "seconds") for target, points in found.items()},
            "updates": {target: middle(points, "updates") for target, points in found.items()},
            "curves": runs,
        }
        shown = (f"KL {kl} " + ("–" if s is None else f"{s:.2f}") for kl, s in arms[arm]["seconds"].items())
        print(f"    {arm:22s} lr {best:<6g} {'  '.join(f'{text:14s}' for text in shown)}", flush=True)
    return arms


def verdict(arms: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Our seconds over those of torchebm's best Langevin arm, by target; None where that did not get there."""
    found: dict[str, dict[str, float | None]] = {}
    for arm in ("ours", "ours, weighted"):
        found[arm] = {}
        for target, seconds in arms[arm]["seconds"].items():
            known = [s for peer in LANGEVIN if (s := arms[peer]["seconds"][target]) is not None]
            if seconds is not None:
                found[arm][target] = seconds / min(known) if known else None
                told = f"in {seconds / min(known):.2f} of" if known else "not reached within the budget by"
                print(f"    KL {target}: {arm}, {told} torchebm's best with Langevin")
    return found


def summary(points: list[dict[str, float]], config: Config) -> dict[str, Any]:
    """Of a run of the grid."""
    met = {f"{target:g}": reached(points, target) for target in config.targets}
    seconds = {target: None if point is None else point["seconds"] for target, point in met.items()}
    return {"seconds": seconds, "last_kl": points[-1]["kl"] if points else None}


def badness(points: list[dict[str, float]], config: Config) -> tuple[float, ...]:
    """Orders rates: most targets met, then the hardest of these soonest, then the last KL."""
    met = [reached(points, target) for target in sorted(config.targets, reverse=True)]
    times = [point["seconds"] for point in met if point is not None]
    return (-len(times), times[-1] if times else math.inf, points[-1]["kl"] if points else math.inf)


def middle(points: list[dict[str, float] | None], key: str) -> float | None:
    """Geometric mean over seeds; None where one did not get there."""
    values = [point[key] for point in points if point is not None]
    return geometric_mean(values) if len(values) == len(points) else None


def main(config: Config) -> None:
    config = config.effective()
    torch.set_num_threads(config.threads)
    parameters = sum(p.numel() for p in network(config, 0).parameters())
    found = machine() | {"parameters": parameters, "torchebm": version("torchebm"), "config": vars(config)}
    spawn = multiprocessing.get_context("spawn")  # a process per side: torchebm changes torch's global settings
    pools = {side: ProcessPoolExecutor(1, mp_context=spawn) for side in ("theirs", "ours")}

    def call(function: Callable[..., Any], config: Config, arm: str = "theirs", *args: Any) -> Any:
        """On the side of an arm; the other one waits."""
        return pools[arm.partition(",")[0]].submit(function, config, arm, *args).result()

    call(check_step, config)
    found["iterations"] = iteration_table(config, call)
    print(f"{config.law}, n = {config.particles}: seconds to an exact KL, geometric mean of {config.seeds} seeds")
    found["time_to_kl"] = time_table(config, call)
    found["seconds_ratio"] = verdict(found["time_to_kl"])
    for pool in pools.values():
        pool.shutdown()
    print("wrote", save("ebm-quick" if config.quick else "ebm", found))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
