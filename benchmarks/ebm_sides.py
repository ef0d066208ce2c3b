"""The two sides of ebm.py, each in a process of its own, and what is asked of them.

What was set so that both do the same, and costs torchebm nothing:

- its defaults that change the objective are off: energy regularisation (`energy_reg_weight`), noise on data;
- persistent chains: a buffer of exactly n, begun at N(0, I) like ours, without warm-up and new noise; its defaults,
  10 000 points near 0, would move a particle at one update in many. "theirs, from data" is plain CD;
- its `LangevinDynamics` with noise_scale = 1 is x − h∇V + √(2h) ξ, our ULA (checked here);
- its `ContrastiveDivergenceTrainer` raises TypeError in 0.8.9 (it hands `use_mixed_precision` to a loss that knows no
  such argument). Its loop is written out, without the two further forwards that it makes for metrics;
- batches are drawn with one generator, without a DataLoader, which would be slower.

Compiled: `Single(compiled=True)` is one graph with the optimizer. torchebm has no switch; three ways are tried: the
potential for all calls; the potential for those of the loss alone, since a compiled potential pulls back to θ even
where only ∇_x is asked for; and the loss with the sampler inside, as far as torch can trace it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from common import milliseconds
from torch import Tensor, nn

from implicit_diffusion import HMC, ULA, ForwardKL, Noise, Single
from implicit_diffusion.commands.ebm.data import Data, load_data
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.models.energy_model import Architecture
from implicit_diffusion.potentials import Tilted

H = 0.01  # of Langevin, both sides
DIVERGED = 1e3  # nats, from about one at the start
WEIGHTED = HMC(0.06, leapfrogs=4)  # of our weighted arm: the default of `implicit-diffusion ebm`
NETWORK, TRAIN = range(1, 3)  # streams of noise
EAGER = ("theirs", "theirs, from data", "theirs, HMC", "ours", "ours, weighted")
COMPILED = ("theirs, potential compiled", "theirs, potential in its loss", "theirs, loss compiled", "ours, compiled")
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
    rounds: int = 10
    """Blocks per arm, in turns."""
    block: int = 20
    """Iterations per block."""
    targets: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1)
    """KL in nats."""
    grid: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates."""
    budget: float = 8.0
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
    return load_data(law, Noise(0))


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
        step_size, leapfrogs = WEIGHTED.step_size_at(0), WEIGHTED.leapfrogs
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
    """Exact KL at instants of training an eighth apart; ends with the budget, or once all targets are met.

    A run that has diverged ends at once, with a KL of `DIVERGED`; ours raises where numbers are NaN or infinite.
    """
    data = data_of(config.law)
    quadrature = Quadrature(data.shift, data.scale, data.law)
    training = make(config, arm, config.particles, lr, seed)
    seconds, updates, look, points = 0.0, 0, config.budget / 50, []
    kl = 0.0
    while seconds < config.budget and kl < DIVERGED:
        start = time.perf_counter()
        try:
            while (now := seconds + time.perf_counter() - start) < look:
                training.step()
                updates += 1
            kl = quadrature.exact_fit(training.potential).kl
        except NonFiniteError:
            kl = math.nan
        kl = kl if kl < DIVERGED else DIVERGED
        seconds, look = now, 1.12 * now
        points.append({"seconds": seconds, "updates": updates, "kl": kl})
        if all(reached(points, target) is not None for target in config.targets):
            break
    return points


def reached(points: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first of three looks in a row at which the KL is below the target."""
    for three in zip(points, points[1:], points[2:]):
        if all(point["kl"] <= target for point in three):
            return three[0]
    return None
