"""What a method reaches: a search of its one setting, then trainings with the best one, judged by the fall of J.

All trainings of a problem have the same budget of network evaluations, Adam, a cosine to zero over that budget, and
gradients clipped to one deviation of the reward, as `finetune` has. Search and trainings use different noise, and are
judged on different noise. J before and after are compared on the same noise, so that their difference is sharp.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from implicit_diffusion.commands.compare.methods import make_loop, paid_before
from implicit_diffusion.commands.compare.problems import Problem, network_of
from implicit_diffusion.commands.compare.summary import Point, Reached, Search
from implicit_diffusion.commands.compare.untrained import best_of_kl, guided, rewards_of
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.evaluation.chains import Estimate, Evaluation, evaluate, mean_and_error
from implicit_diffusion.loops import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain

TRAIN, JUDGE, SEARCH = 4, 5, 6  # streams of noise; SEARCH has a TRAIN and a JUDGE of its own


@dataclass(frozen=True)
class Budget:
    """What all trainings of a comparison share.

    Args:
        updates: of "adjoint", whose network evaluations every method gets.
        batch: samples per gradient.
        depth: K of "draft".
        points: measurements of J.
        held_out: initial noises of each.
    """

    updates: int
    batch: int
    depth: int
    points: int
    held_out: int

    def evaluations(self, chain: Chain) -> int:
        """N forward, and N back by the present network; on trained rows also by the pretrained one, for the path KL."""
        return self.updates * self.batch * (2 * chain.num_steps + len(chain.trained_rows))


class Judge:
    """J on noise that no training sees, as a fall from before training.

    Args:
        problem: that is judged.
        noise: of the judgement.
        starts: number of initial noises.
    """

    def __init__(self, problem: Problem, noise: Noise, starts: int) -> None:
        self.problem, self.noise, self.starts = problem, noise, starts
        self.before = self._evaluated(problem.pretrained.pretrained())

    def __call__(self, chain: Chain, evaluations: int = 0, seconds: float = 0.0, updates: int = 0) -> Point:
        """The point of a chain, after so much work."""
        after = self._evaluated(chain)
        falls = self.before.objective(self.problem.beta) - after.objective(self.problem.beta)
        reward, kl = after.reward.double().mean().item(), after.path_kl.double().mean().item()
        return Point(evaluations, seconds, updates, mean_and_error(falls), reward, kl)

    def best_of(self, count: int) -> Point:
        """The point of best of `count`, in groups of the noise's trajectories."""
        rewards, kl = rewards_of(self.problem, count, self.noise, self.starts), best_of_kl(count)
        best = rewards.amax(1)
        fall = mean_and_error(best - rewards.mean(1) - self.problem.beta * kl)
        return Point(0, 0.0, 0, fall, best.double().mean().item(), kl)

    def _evaluated(self, chain: Chain) -> Evaluation:
        return evaluate(chain, self.problem.reward, self.noise, starts=self.starts)


def train(
    problem: Problem, method: str, setting: float, budget: Budget, noise: Noise, judge: Judge, points: int
) -> list[Point]:
    """A training, or the single point of a method without one; empty where it diverges.

    Args:
        problem: that is trained for.
        method: its name.
        setting: learning rate at the start, strength of guidance, or M.
        budget: of the comparison.
        noise: of the training.
        judge: of it.
        points: number of measurements, the last one at the end.
    """
    if method == "guidance":
        return [judge(guided(problem, setting))]
    if method == "best-of":
        return [judge.best_of(round(setting))]
    chain, paid = problem.chain(), paid_before(method, problem)
    adam = torch.optim.Adam(network_of(chain).parameters(), lr=setting)
    update = Update(adam, max_grad_norm=problem.deviation)
    begin = time.process_time()
    loop = make_loop(method, problem, chain, update, batch=budget.batch, depth=budget.depth, noise=noise)
    seconds, total = time.process_time() - begin, budget.evaluations(chain) - paid
    curve: list[Point] = []
    try:
        for point in range(points):
            begin = time.process_time()
            while loop.evaluations < (point + 1) / points * total:
                adam.param_groups[0]["lr"] = setting * (1 + math.cos(math.pi * min(1, loop.evaluations / total))) / 2
                loop.step()
            seconds += time.process_time() - begin
            curve.append(judge(chain, paid + loop.evaluations, seconds, update.updates))
    except NonFiniteError:
        return []
    return curve if all(math.isfinite(point.fall.mean) for point in curve) else []


def search(fall_at: Callable[[float], float], start: float, factor: float, widest: int, least: float = 0.0) -> Search:
    """The best setting of a geometric grid, extended until the settings beside the best one are known to be worse.

    Args:
        fall_at: the fall of J that a setting reaches; −∞ where the training diverges.
        start: setting in the middle of the first three.
        factor: ratio of neighbours.
        widest: number of settings after which the search ends in any case.
        least: smallest setting that there is; at it, nothing beyond is missing.

    Returns:
        the search, with `evaluations` zero.
    """
    falls: dict[int, float] = {}

    def place(k: int) -> float:
        return start * factor**k

    wanted: list[int] = [k for k in (-1, 0, 1) if place(k) >= least]
    while wanted and len(falls) < widest:
        k = wanted.pop(0)
        falls[k] = fall_at(place(k))
        if not wanted:
            best = max(sorted(falls), key=falls.__getitem__)  # the smallest of equals: where all diverge, go down
            wanted = [k for k in (best - 1, best + 1) if k not in falls and place(k) >= least]
    best = max(sorted(falls), key=falls.__getitem__)
    beside = [k for k in (best - 1, best + 1) if place(k) >= least]
    known = {place(k): fall if math.isfinite(fall) else None for k, fall in sorted(falls.items())}
    return Search(
        {f"{setting:.4g}": fall for setting, fall in known.items()},
        place(best),
        all(k in falls for k in beside) and math.isfinite(falls[best]),
        0,
    )


def first_setting(problem: Problem, method: str, factor: float) -> dict[str, Any]:
    """Where the search of a method begins, and how it steps; arguments of `search`."""
    if method == "best-of":
        return {"start": 4.0, "factor": 2.0, "least": 1.0}
    return {"start": 1.0 if method == "guidance" else problem.rate, "factor": factor}


def summarise(problem: Problem, method: str, searched: Search, curves: list[list[Point]]) -> Reached:
    """Means over the seeds that came through; the errors of seeds and of the held-out noise, which they share."""
    through = [curve for curve in curves if curve]
    ends = [curve[-1] for curve in through]
    possible = problem.before.mean - problem.best.j
    fall = captured = None
    if ends:
        falls = [end.fall.mean for end in ends]
        noise = fmean(end.fall.error for end in ends)
        seeds = stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
        fall = Estimate(fmean(falls), math.hypot(noise, seeds))
        captured = Estimate(fall.mean / possible, fall.error / possible)
    samples = round(searched.best) if method == "best-of" else 1
    return Reached(
        problem=problem.name,
        method=method,
        search=searched,
        fall=fall,
        captured=captured,
        path_kl=fmean(end.path_kl for end in ends) if ends else None,
        evaluations=fmean(end.evaluations for end in ends) if ends else 0.0,
        seconds=fmean(end.seconds for end in ends) if ends else 0.0,
        calls_per_sample=samples * problem.pretrained.num_steps,
        diverged=len(curves) - len(through),
        curves=through,
    )
