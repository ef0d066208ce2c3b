"""How every arm of the hexagon runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.commands.hexagon.config import Setting
from implicit_diffusion.commands.hexagon.trace import Trace, finite, logits_of, potential_of
from implicit_diffusion.commands.shared.hexagon_problem import HexagonQuadrature, hard_reward, mixture
from implicit_diffusion.commands.shared.ranges import WORDS
from implicit_diffusion.loops import NestedParticles, Single, Unrolled
from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise, statistics
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Objective, Reward
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.samplers import ULA
from implicit_diffusion.samplers.simulation import simulate

NESTED_STEPS, UNROLLED_STEPS, TUNING_SEEDS = 20, 5, 6
ENOUGH = 16  # particles for the noise of Γ: two in each of eight groups
START, DATA, TRAIN, TUNE = range(4)  # streams of noise
TRAINED = ("implicit", "weighted", "nested", "nested_tuned", "unrolled", "unrolled_tuned")
ARMS = ("untrained", "implicit", "weighted", "guidance", "transfer", *TRAINED[2:])


class Arms:
    """The arms of one study; "transfer" needs the θ_opt of "implicit", so that these runs come first.

    Args:
        setting: what the arms share.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.kernel = setting, ULA(setting.step_size)
        self.rates = dict.fromkeys(TRAINED, setting.lr)
        self.optimal: dict[int, Tensor] = {}  # θ_opt by seed
        self.compiled: dict[str, ParticleLoop] = {}  # by arm: compiling once serves all seeds

    def run(self, name: str, seed: int) -> Trace:
        """One run of one arm."""
        noise = Noise(seed)
        if name in TRAINED:
            return self._train(name, seed, noise, self.rates[name])
        logits = self.optimal[seed] if name == "transfer" else None
        return self._sample(name, seed, noise, potential_of(name, logits, self.setting.sigma, self.setting.guidance))

    def restore(self, state: dict[str, Any]) -> Trace:
        """The trace of a run that is finished; other arms use its θ from then on."""
        if state["arm"] == "implicit":
            self.optimal[state["seed"]] = state["logits"].clone()
        return Trace.load(state, self.setting.sigma, self.setting.guidance)

    def tune(self, name: str, exact: HexagonQuadrature) -> tuple[float, dict[str, float]]:
        """`best_rate` of the grid, and the mean final exact reward for every η of it, on seeds of their own."""
        rewards: dict[float, list[float]] = {}
        for rate in self.setting.grid:
            runs = [self._train(name, seed, Noise(seed).stream(TUNE), rate) for seed in range(TUNING_SEEDS)]
            rewards[rate] = [exact.reward(logits_of(t.potential)) for t in runs]
        return best_rate(rewards), {f"{rate:g}": mean(values) for rate, values in rewards.items()}

    def start(self, noise: Noise, exact: bool) -> Float[Tensor, "n 2"]:
        """X_0: N(0, I) as in the paper, or draws from π_θ0 where weights or narrow modes need them."""
        n, initial = self.setting.particles, mixture(None, self.setting.sigma)
        if exact or self.setting.sigma < 1:
            return initial.sample(n, noise, START)
        return noise.normal((n, 2), START)

    def loop(self, name: str, noise: Noise, rate: float) -> tuple[ParticleLoop, int]:
        """The loop of an arm that trains, and the number of its updates."""
        setting, potential = self.setting, mixture(None, self.setting.sigma)
        objective: Objective = Reward(hard_reward)
        if setting.forward_kl:
            data = mixture(None, setting.sigma).sample(100_000, noise, DATA)
            objective = objective + setting.forward_kl * ForwardKL(data, batch=setting.particles)
        sgd = torch.optim.SGD([potential.logits], lr=rate)
        common: dict[str, Any] = {
            "particles": self.start(noise, exact=name == "weighted"),
            "noise": noise.stream(TRAIN),
        }
        budget = 2 * setting.steps
        if name.startswith("nested"):
            nested = NestedParticles(potential, self.kernel, objective, sgd, inner_steps=NESTED_STEPS, **common)
            return nested, max(1, budget // (NESTED_STEPS + 1))
        if name.startswith("unrolled"):
            unrolled = Unrolled(potential, self.kernel, objective, sgd, unrolled_steps=UNROLLED_STEPS, **common)
            return unrolled, max(1, budget // (2 * UNROLLED_STEPS))
        weighted = name == "weighted"
        common |= {"weighted": weighted, "lag": not weighted, "compiled": setting.compiled}
        fresh = Single(potential, self.kernel, objective, sgd, **common)
        loop = self.compiled.setdefault(name, fresh) if setting.compiled else fresh
        if loop is not fresh:
            loop.noise, loop.objective = fresh.noise, fresh.objective
            loop.load_state_dict(fresh.state_dict())
        return loop, setting.steps

    def _train(self, name: str, seed: int, noise: Noise, rate: float) -> Trace:
        loop, updates = self.loop(name, noise, rate)
        potential = loop.model
        assert isinstance(potential, GaussianMixture)

        def steps() -> Iterator[tuple[dict[str, Any], Tensor]]:
            for metrics in loop.run(updates):
                yield metrics, loop.weighted_state.x

        trace = Trace(name, seed, potential)
        trace.record(steps(), updates, lambda: potential.logits.detach().clone())
        last = trace.points[-1]
        trace.potential = mixture(potential.logits.detach(), self.setting.sigma)
        diagnostics: dict[str, float] = statistics(loop)
        if loop.n >= ENOUGH:
            diagnostics["signal_to_noise"] = signal_to_noise(loop)
        history = None
        if len(trace.history) >= 8 and not name.startswith("nested"):  # nested particles start from X_0 every time
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
        steps, per_step = self.setting.steps, self.kernel.evaluations_per_step
        x = self.start(noise, exact=False)

        def moves() -> Iterator[tuple[dict[str, Any], Tensor]]:
            for k, (state, _) in enumerate(simulate(self.kernel, potential, x, noise.stream(TRAIN), steps), 1):
                yield {"reward": hard_reward(state.x).mean(), "gradient_evaluations": k * per_step}, state.x

        trace = Trace(name, seed, potential)
        trace.record(moves(), steps, lambda: logits_of(potential).detach())
        return trace


def best_rate(rewards: dict[float, list[float]]) -> float:
    """The smallest rate whose mean reward is the best one's, within a standard error or a thousandth of it.

    A rate that jumps to one mode or another by chance would win by luck otherwise, and on a plateau the largest by the
    last digit.

    Args:
        rewards: by rate, of the same seeds in the same order, at least two.
    """
    best = rewards[max(rewards, key=lambda rate: mean(rewards[rate]))]

    def ties(values: list[float]) -> bool:
        behind = [b - v for b, v in zip(best, values)]
        return mean(behind) <= max(stdev(behind) / math.sqrt(len(behind)), mean(best) / 1000)

    return min(rate for rate, values in rewards.items() if ties(values))
