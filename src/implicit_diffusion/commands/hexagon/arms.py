"""How every arm of the hexagon runs, and what is recorded on the way."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.commands.hexagon.problem import Exact, hard_reward, mixture, smooth_reward
from implicit_diffusion.commands.shared.ranges import WORDS, at_least, not_negative, positive
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import NestedParticles, Single, Unrolled
from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise, statistics
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Objective, Reward
from implicit_diffusion.potentials import GaussianMixture, Guided
from implicit_diffusion.samplers import ULA
from implicit_diffusion.samplers.simulate import simulate
from implicit_diffusion.showing import Shown

INNER, UNROLL, RECORDS, TUNING_SEEDS = 20, 5, 100, 6
WATCHED = 128  # particles whose mixing is looked at
NARROWEST = 0.05  # σ that the coarse grid of `Exact` resolves: its cells are as wide, and the error e^{−2π²}
ENOUGH = 16  # particles for the noise of Γ: two in each of eight groups
START, DATA, TRAIN, TUNE = range(4)  # streams of noise
TRAINED = ("implicit", "weighted", "nested", "nested_tuned", "unrolled", "unrolled_tuned")
ARMS = ("untrained", "implicit", "weighted", "guidance", "transfer", *TRAINED[2:])
SHOWN = ("reward", "gradient_evaluations", "lag", "ess", "log_z", "grad_norm")
COMPILED_FROM = 20_000  # iterations in all, above which compiling pays


@dataclass(frozen=True)
class Config:
    """Reproduce section 5.1 of the paper: optimise the weights of six Gaussians through Langevin sampling."""

    steps: int = 5000
    """Number K of iterations of the single loop; the other arms get as many gradient evaluations."""
    particles: int = 1000
    """Number of particles."""
    seeds: int = 10
    """Number of runs of every arm."""
    seed: int = 0
    """Seed of the first run; the others count on from it."""
    sigma: float = 1.0
    """Standard deviation of the Gaussians, whose centres lie at radius 4."""
    step_size: float | None = None
    """Step size h of the Langevin steps; 0.2 σ² by default."""
    lr: float = 0.1
    """Step size η of plain gradient steps on the parameters θ."""
    forward_kl: float = 0.0
    """Weight of KL(π_θ0‖π_θ), a penalty beside the reward."""
    guidance: float = 10.0
    """Strength λ of the guidance arm, which samples V − λ R_smooth without training."""
    grid: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
    """Step sizes η to try for the nested and unrolled arms."""
    compile: bool | None = None
    """Compile the single loop's inner update; by default from 20,000 iterations (steps × seeds), where it pays."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/hexagon-<time>."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=10, particles=2, seeds=1, seed=0)
        positive(self, "sigma", "step_size", "lr")
        not_negative(self, "forward_kl", "guidance")
        if self.sigma < NARROWEST:
            raise InvalidInputError(
                f"--sigma must be at least {NARROWEST}, got {self.sigma}: narrower modes would be lost between the "
                "points of the quadrature"
            )
        if not self.grid or min(self.grid) <= 0:
            raise InvalidInputError(f"--grid must hold positive learning rates, got {self.grid}")

    def resolved(self) -> Config:
        """The same with defaults that depend on others filled in."""
        return replace(
            self,
            step_size=0.2 * self.sigma**2 if self.step_size is None else self.step_size,
            compile=self.steps * self.seeds >= COMPILED_FROM and shutil.which("c++") is not None
            if self.compile is None
            else self.compile,
        )


@dataclass(repr=False)
class Trace(Shown):
    """One run of one arm.

    Args:
        arm: its name.
        seed: of its noise.
        potential: the final one.
        points: what happened, one dictionary per record.
        clouds: particles at the beginning, half-way and at the end, with θ there.
        seconds: spent sampling and training.
        tail: rewards of the last tenth of the iterations.
        history: first coordinate of some particles, one row per record.
        diagnostics: of the loop at the end, and of the second half of the history.
        advice: what they say, in words.
    """

    arm: str
    seed: int
    potential: nn.Module
    points: list[dict[str, Any]] = field(default_factory=list)
    clouds: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    seconds: float = 0.0
    tail: list[float] = field(default_factory=list)
    history: list[Tensor] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """All that summary, figures and later arms need, as `save_state` keeps it; `Arms.trace` is the way back."""
        kept = ("arm", "seed", "points", "clouds", "seconds", "tail", "diagnostics", "advice")
        return {name: getattr(self, name) for name in kept} | {"logits": logits_of(self.potential).detach()}


class Arms:
    """How every arm runs."""

    def __init__(self, config: Config) -> None:
        assert config.step_size is not None
        self.config, self.kernel = config, ULA(config.step_size)
        self.rates = dict.fromkeys(TRAINED, config.lr)
        self.optimal: dict[int, Tensor] = {}  # θ_opt by seed
        self.compiled: dict[str, ParticleLoop] = {}  # by arm: compiling once serves all seeds

    def run(self, name: str, seed: int) -> Trace:
        """One run of one arm."""
        noise = Noise(seed)
        if name in TRAINED:
            return self._train(name, seed, noise, self.rates[name])
        return self._sample(
            name, seed, noise, self._potential(name, self.optimal[seed] if name == "transfer" else None)
        )

    def trace(self, found: dict[str, Any]) -> Trace:
        """The trace that a state tells of; other arms take its θ from there."""
        values = dict(found)
        logits = values.pop("logits")
        if values["arm"] == "implicit":
            self.optimal[values["seed"]] = logits.clone()
        return Trace(potential=self._potential(values["arm"], logits), **values)

    def _potential(self, name: str, logits: Tensor | None) -> nn.Module:
        """V of an arm at θ = logits, θ_0 where None."""
        plain = mixture(logits, self.config.sigma)
        return Guided(plain, smooth_reward, self.config.guidance) if name == "guidance" else plain

    def tune(self, name: str, exact: Exact) -> tuple[float, dict[str, float]]:
        """`best_rate` of the grid, and the mean final exact reward for every η of it, on seeds of their own."""
        rewards: dict[float, list[float]] = {}
        for rate in self.config.grid:
            runs = [self._train(name, seed, Noise(seed).stream(TUNE), rate) for seed in range(TUNING_SEEDS)]
            rewards[rate] = [exact.reward(logits_of(t.potential)) for t in runs]
        return best_rate(rewards), {f"{rate:g}": mean(values) for rate, values in rewards.items()}

    def start(self, noise: Noise, exact: bool) -> Tensor:
        """X_0: N(0, I) as in the paper, or draws from π_θ0 where weights or narrow modes ask for them."""
        n, initial = self.config.particles, mixture(None, self.config.sigma)
        if exact or self.config.sigma < 1:
            return initial.sample(n, noise, START)
        return noise.normal((n, 2), START)

    def loop(self, name: str, noise: Noise, rate: float) -> tuple[ParticleLoop, int]:
        """The loop of an arm that trains, and its updates."""
        config, potential = self.config, mixture(None, self.config.sigma)
        objective: Objective = Reward(hard_reward)
        if config.forward_kl:
            data = mixture(None, config.sigma).sample(100_000, noise, DATA)
            objective = objective + config.forward_kl * ForwardKL(data, batch=config.particles)
        sgd = torch.optim.SGD([potential.logits], lr=rate)
        common: dict[str, Any] = {
            "particles": self.start(noise, exact=name == "weighted"),
            "noise": noise.stream(TRAIN),
        }
        budget = 2 * config.steps
        if name.startswith("nested"):
            nested = NestedParticles(potential, self.kernel, objective, sgd, inner_steps=INNER, **common)
            return nested, max(1, budget // (INNER + 1))
        if name.startswith("unrolled"):
            unrolled = Unrolled(potential, self.kernel, objective, sgd, unrolled_steps=UNROLL, **common)
            return unrolled, max(1, budget // (2 * UNROLL))
        weighted = name == "weighted"
        common |= {"weighted": weighted, "lag": not weighted, "compiled": bool(config.compile)}
        fresh = Single(potential, self.kernel, objective, sgd, **common)
        loop = self.compiled.setdefault(name, fresh) if config.compile else fresh
        if loop is not fresh:
            loop.noise, loop.objective = fresh.noise, fresh.objective
            loop.load_state_dict(fresh.state_dict())
        return loop, config.steps

    def _train(self, name: str, seed: int, noise: Noise, rate: float) -> Trace:
        loop, updates = self.loop(name, noise, rate)
        potential = loop.model
        assert isinstance(potential, GaussianMixture)

        def steps() -> Iterator[tuple[dict[str, Any], Tensor]]:
            for metrics in loop.run(updates):
                yield metrics, loop.walkers.x

        trace = _record(Trace(name, seed, potential), steps(), updates, lambda: potential.logits.detach().clone())
        last = trace.points[-1]
        trace.potential = mixture(potential.logits.detach(), self.config.sigma)
        diagnostics: dict[str, float] = statistics(loop)
        if loop.n >= ENOUGH:
            diagnostics["signal_to_noise"] = signal_to_noise(loop)
        history = None
        if len(trace.history) >= 8 and not name.startswith("nested"):  # nested particles begin anew every time
            history = torch.stack(trace.history[len(trace.history) // 2 :])
            diagnostics |= {"r_hat": r_hat(history), "ess_in_time": ess_in_time(history), "records": len(history)}
        trace.diagnostics = finite(diagnostics)
        trace.advice = advice(
            loop,
            {k: last[k] for k in ("lag", "ess") if k in last},
            history,
            words=WORDS | {"weigh": "the weighted arm"},
        )
        return trace

    def _sample(self, name: str, seed: int, noise: Noise, potential: nn.Module) -> Trace:
        steps, per = self.config.steps, self.kernel.evaluations
        x = self.start(noise, exact=False)

        def moves() -> Iterator[tuple[dict[str, Any], Tensor]]:
            for k, move in enumerate(simulate(self.kernel, potential, x, noise.stream(TRAIN), steps), 1):
                yield {"reward": hard_reward(move.x).mean(), "gradient_evaluations": k * per}, move.x

        return _record(Trace(name, seed, potential), moves(), steps, lambda: logits_of(potential).detach())


def best_rate(rewards: dict[float, list[float]]) -> float:
    """The smallest rate whose mean reward is the best one's, within a standard error or a thousandth of it.

    A rate that jumps to one mode or another by chance would win by luck otherwise, and on a plateau the largest by the
    last digit. The rewards are those of the same seeds, at least two.
    """
    best = rewards[max(rewards, key=lambda rate: mean(rewards[rate]))]

    def ties(values: list[float]) -> bool:
        behind = [b - v for b, v in zip(best, values)]
        return mean(behind) <= max(stdev(behind) / math.sqrt(len(behind)), mean(best) / 1000)

    return min(rate for rate, values in rewards.items() if ties(values))


def _record(
    trace: Trace, steps: Iterator[tuple[dict[str, Any], Tensor]], total: int, logits: Callable[[], Tensor]
) -> Trace:
    """Drive `total` steps; keep a hundred records, three clouds of particles and the rewards of the last tenth."""
    due = {round(total * (i + 1) / RECORDS) for i in range(RECORDS)}
    start, clouds = time.perf_counter(), (1, (total + 1) // 2, total)
    for k, (metrics, x) in enumerate(steps, 1):
        trace.seconds += time.perf_counter() - start
        if k > total - max(1, total // 10):
            trace.tail.append(float(metrics["reward"]))
        if k in due:
            point = finite({name: float(metrics[name]) for name in SHOWN if name in metrics})
            trace.history.append(x[:WATCHED, 0].detach().clone())
            trace.points.append({"iteration": k, "seconds": trace.seconds, "logits": logits()} | point)
        if k in clouds:
            trace.clouds.append((x.detach().clone(), logits()))
        start = time.perf_counter()
    return trace


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """Without ratios of nothing to nothing, which a saturated θ or too few particles leave: files hold numbers only."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def logits_of(potential: nn.Module) -> Tensor:
    """θ of a mixture, guided or not."""
    inner = potential.potential if isinstance(potential, Guided) else potential
    assert isinstance(inner, GaussianMixture)
    return inner.logits
