"""How every arm of the hexagon runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.hexagon.config import Setting
from implicit_diffusion.commands.hexagon.trace import Now, Trace, finite, logits_of, potential_of, record
from implicit_diffusion.commands.shared.hexagon_problem import HexagonQuadrature, hard_reward, mixture
from implicit_diffusion.commands.shared.ranges import WORDS
from implicit_diffusion.loops import NestedParticles, Single, Unrolled, Vectorized
from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise, statistics
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Objective, Reward
from implicit_diffusion.processes import world_size
from implicit_diffusion.samplers import ULA
from implicit_diffusion.samplers.simulation import simulate_together

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
        self.setting, self.kernel, self.reward = setting, ULA(setting.step_size), Reward(hard_reward)
        self.rates = dict.fromkeys(TRAINED, setting.lr)
        self.optimal: dict[int, Tensor] = {}  # θ_opt by seed

    def run(self, name: str, seeds: Sequence[int]) -> list[Trace]:
        """One run of one arm for every seed; they step together where they can."""
        if name in TRAINED:
            return self._train(name, seeds, [Noise(seed) for seed in seeds], self.rates[name])
        return self._sample(name, seeds)

    def restore(self, state: dict[str, Any]) -> Trace:
        """The trace of a run that is finished; other arms use its θ from then on."""
        if state["arm"] == "implicit":
            self.optimal[state["seed"]] = state["logits"].clone()
        return Trace.load(state, self.setting.sigma, self.setting.guidance)

    def tune(self, name: str, exact: HexagonQuadrature) -> tuple[float, dict[str, float]]:
        """`best_rate` of the grid, and the mean final exact reward for every η of it, on seeds of their own."""
        rewards: dict[float, list[float]] = {}
        for rate in self.setting.grid:
            seeds = range(TUNING_SEEDS)
            runs = self._train(name, seeds, [Noise(seed).stream(TUNE) for seed in seeds], rate)
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
        objective: Objective = self.reward
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
        return Single(potential, self.kernel, objective, sgd, **common), setting.steps

    def _train(self, name: str, seeds: Sequence[int], noises: Sequence[Noise], rate: float) -> list[Trace]:
        loops, (updates, *_) = zip(*(self.loop(name, noise, rate) for noise in noises))
        if len(loops) > 1 and world_size() > 1:  # processes share the particles of one run
            return [self._train(name, [seed], [noise], rate)[0] for seed, noise in zip(seeds, noises)]
        together = Vectorized(loops) if len(loops) > 1 else None
        source: Vectorized | ParticleLoop = together or loops[0]

        def now() -> list[tuple[Tensor, Tensor]]:
            present = loops if together is None else together.loops
            return [(loop.weighted_state.x, logits_of(loop.model).detach().clone()) for loop in present]

        traces = [Trace(name, seed, loop.model) for seed, loop in zip(seeds, loops)]
        record(traces, ((metrics, now) for metrics in source.run(updates)), updates)
        for trace, loop in zip(traces, loops if together is None else together.loops):
            self._diagnose(trace, loop)
        return traces

    def _diagnose(self, trace: Trace, loop: ParticleLoop) -> None:
        """What the loop says at the end of its run."""
        last = trace.points[-1]
        trace.potential = mixture(logits_of(loop.model).detach(), self.setting.sigma)
        diagnostics: dict[str, float] = statistics(loop)
        if loop.n >= ENOUGH:
            diagnostics["signal_to_noise"] = signal_to_noise(loop)
        history = None
        if len(trace.history) >= 8 and not trace.arm.startswith("nested"):  # those start from X_0 every time
            history = torch.stack(trace.history[len(trace.history) // 2 :])
            diagnostics |= {"r_hat": r_hat(history), "ess_in_time": ess_in_time(history), "records": len(history)}
        trace.diagnostics = finite(diagnostics)
        trace.advice = advice(
            loop,
            {k: last[k] for k in ("lag", "ess") if k in last},
            history,
            words=WORDS | {"weigh": "the weighted arm"},
        )

    def _sample(self, name: str, seeds: Sequence[int]) -> list[Trace]:
        setting, noises = self.setting, [Noise(seed) for seed in seeds]
        logits = [self.optimal[seed] if name == "transfer" else None for seed in seeds]
        potentials = [potential_of(name, own, setting.sigma, setting.guidance) for own in logits]
        x = torch.stack([self.start(noise, exact=False) for noise in noises])
        thetas = [logits_of(potential).detach() for potential in potentials]

        def moves() -> Iterator[tuple[dict[str, Any], Now]]:
            streams = [noise.stream(TRAIN) for noise in noises]
            for k, y in enumerate(simulate_together(self.kernel, potentials, x, streams, setting.steps), 1):
                rewards = hard_reward(y.flatten(0, 1)).unflatten(0, y.shape[:2]).mean(1)
                work = k * self.kernel.evaluations_per_step
                yield {"reward": rewards, "gradient_evaluations": work}, partial(zip, y, thetas)

        traces = [Trace(name, seed, potential) for seed, potential in zip(seeds, potentials)]
        record(traces, moves(), setting.steps)
        return traces


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
