"""The runs of the study: which there are, and what is kept of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.theory.config import Config
from implicit_diffusion.commands.theory.denoising import Denoising, QueueResult, run_queue
from implicit_diffusion.commands.theory.lag import lags
from implicit_diffusion.commands.theory.langevin import ConstantSteps, records, running_means, settled
from implicit_diffusion.commands.theory.problems import PROBLEMS
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import progress
from implicit_diffusion.runs.study import Study
from implicit_diffusion.showing import Shown

STEP_SIZES, RATIO, MANY = (0.004, 0.012, 0.04, 0.12, 0.4), 0.25, 240  # h; η/h and n beside it
RATIOS, STEP_SIZE = (0.005, 0.015, 0.05, 0.15, 0.5), 0.25  # η/h, and h beside it
LENGTHS, PACES = (5, 10, 20, 40), (0.01, 0.03, 0.1)  # N and ηG² of the queue
LAG_RATIOS, WEIGHTED_RUNS = (0.002, 0.006, 0.02, 0.06, 0.2), 16  # η/h; runs are as many as copies, at most these
RATES, FLOORS, QUEUE, LAG = range(4)  # streams of noise, by part

FloorRun = tuple[ConstantSteps, dict[str, Tensor]]
Once = Callable[..., Any]  # `Study.once`


@dataclass(frozen=True, repr=False)
class Results(Shown):
    """All that was measured; None for parts that were not asked for.

    Args:
        rates: running means of ∇ℓ², with shape (records, problems, copies).
        floors: runs with constant steps whose h differ, and those whose η/h differ, with means of ∇ℓ and ∇ℓ² of every
            copy.
        queue: numbers of the queue, and the mean path of θ with its standard error, with shape (2, times).
        lag: by η/h, the lags of unweighted copies and of weighted runs.
    """

    rates: Float[Tensor, "records problems copies"] | None
    floors: tuple[list[FloorRun], list[FloorRun]] | None
    queue: list[tuple[QueueResult, Float[Tensor, "2 times"]]] | None
    lag: dict[float, tuple[Float[Tensor, " copies"], Float[Tensor, " runs"]]] | None


def measure(config: Config, study: Study) -> Results:
    """Make the runs that are missing of the parts that are asked for; returns the results of all."""
    runs = {
        "rates": 1,
        "floors": len(STEP_SIZES) + len(RATIOS),
        "queue": len(LENGTHS) * len(PACES),
        "lag": len(LAG_RATIOS),
    }
    with progress(sum(runs[part] for part in config.parts), "theory") as bar:

        def once(*key: str | int | float, make: Callable[[], Any], lines: Any = None) -> Any:
            result = study.once(*key, make=make, lines=lines)
            bar.update()
            return result

        return Results(
            rates=_rates(config, once) if "rates" in config.parts else None,
            floors=_floors(config, once) if "floors" in config.parts else None,
            queue=_queue(config, once) if "queue" in config.parts else None,
            lag=_lag(config, once) if "lag" in config.parts else None,
        )


def _rates(config: Config, once: Once) -> Float[Tensor, "records problems copies"]:
    means: Tensor = once(
        "rates",
        make=lambda: running_means(config.steps, config.particles, config.copies, _seed(config, RATES)),
        lines=partial(_lines, config),
    )
    return means


def _lines(config: Config, means: Float[Tensor, "records problems copies"]) -> Iterable[dict[str, Any]]:
    """Lines of metrics.jsonl: the running mean of every problem, over its copies."""
    for i, problem in enumerate(PROBLEMS):
        for K, mean in zip(records(config.steps).tolist(), means[:, i].mean(1).tolist(), strict=True):
            yield {"arm": problem.name, "seed": config.seed, "updates": K, "squared_gradient": mean}


def _floors(config: Config, once: Once) -> tuple[list[FloorRun], list[FloorRun]]:
    constant = partial(ConstantSteps, copies=config.copies, measured=config.steps // 3)
    by_step_size = [
        constant(step_size=h, ratio=RATIO, particles=MANY, seed=_seed(config, FLOORS, i))
        for i, h in enumerate(STEP_SIZES)
    ]
    by_ratio = [
        constant(step_size=STEP_SIZE, ratio=ratio, particles=config.particles, seed=_seed(config, FLOORS, 50 + i))
        for i, ratio in enumerate(RATIOS)
    ]

    def made(runs: list[ConstantSteps]) -> list[FloorRun]:
        return [(run, once("floor", run.step_size, run.ratio, make=partial(settled, run))) for run in runs]

    return made(by_step_size), made(by_ratio)


def _queue(config: Config, once: Once) -> list[tuple[QueueResult, Float[Tensor, "2 times"]]]:
    def make(problem: Denoising, seed: int) -> dict[str, Any]:
        numbers, path = run_queue(problem, config.copies, config.steps, seed)
        error = path.std(1) / path.shape[1] ** 0.5
        return {"numbers": asdict(numbers), "path": torch.stack([path.mean(1), error])}

    results = []
    for i, (N, pace) in enumerate(product(LENGTHS, PACES)):
        result = once("queue", N, pace, make=partial(make, Denoising(N, pace), _seed(config, QUEUE, i)))
        results.append((QueueResult(**result["numbers"]), result["path"]))
    return results


def _lag(config: Config, once: Once) -> dict[float, tuple[Float[Tensor, " copies"], Float[Tensor, " runs"]]]:
    def make(ratio: float, noise: Noise) -> dict[str, Tensor]:
        weighted = [lags(ratio, 1, True, noise.stream(1, i)) for i in range(min(WEIGHTED_RUNS, config.copies))]
        return {"unweighted": lags(ratio, config.copies, False, noise.stream(0)), "weighted": torch.cat(weighted)}

    results = {}
    for i, ratio in enumerate(LAG_RATIOS):
        result = once("lag", ratio, make=partial(make, ratio, Noise(_seed(config, LAG, i))))
        results[ratio] = result["unweighted"], result["weighted"]
    return results


def _seed(config: Config, part: int, run: int = 0) -> int:
    """The seed of a run."""
    return config.seed + 100 * part + run
