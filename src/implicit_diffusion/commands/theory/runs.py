"""The runs of the study: which there are, and what is kept of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
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

STEP_SIZES, RATIO, MANY = (0.004, 0.012, 0.04, 0.12, 0.4), 0.25, 240  # h; η/h and n beside it
RATIOS, STEP_SIZE = (0.005, 0.015, 0.05, 0.15, 0.5), 0.25  # η/h, and h beside it
LENGTHS, PACES = (5, 10, 20, 40), (0.01, 0.03, 0.1)  # N and ηG² of the queue
LAG_RATIOS, WEIGHTED_RUNS = (0.002, 0.006, 0.02, 0.06, 0.2), 16  # η/h; runs are as many as copies, at most these
RATES, FLOORS, QUEUE, LAG = range(4)  # streams of noise, by part

FloorRun = tuple[ConstantSteps, dict[str, Tensor]]


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Args:
        means: running means of ∇ℓ², with shape (records, problems, copies).
        by_step_size: runs with constant steps whose h differ, with means of ∇ℓ and ∇ℓ² of every copy.
        by_ratio: those whose η/h differ.
        queue: numbers of the queue, and the mean path of θ with its standard error, with shape (2, times).
        lag: by η/h, the lags of unweighted copies and of weighted runs.
    """

    means: Float[Tensor, "records problems copies"]
    by_step_size: list[FloorRun]
    by_ratio: list[FloorRun]
    queue: list[tuple[QueueResult, Float[Tensor, "2 times"]]]
    lag: dict[float, tuple[Float[Tensor, " copies"], Float[Tensor, " runs"]]]


def measure(config: Config, study: Study) -> Results:
    """Make the runs that are missing; returns the results of all."""
    constant = partial(ConstantSteps, copies=config.copies, longest=config.steps // 2)
    by_step_size = [
        constant(step_size=h, ratio=RATIO, particles=MANY, seed=_seed(config, FLOORS, i))
        for i, h in enumerate(STEP_SIZES)
    ]
    by_ratio = [
        constant(step_size=STEP_SIZE, ratio=ratio, particles=config.particles, seed=_seed(config, FLOORS, 50 + i))
        for i, ratio in enumerate(RATIOS)
    ]
    denoising = [Denoising(N, pace) for N in LENGTHS for pace in PACES]
    total = 1 + len(by_step_size) + len(by_ratio) + len(denoising) + len(LAG_RATIOS)
    with progress(total, "theory") as bar:

        def once(*key: str | int | float, make: Callable[[], Any], lines: Any = None) -> Any:
            result = study.once(*key, make=make, lines=lines)
            bar.update()
            return result

        means = once(
            "rates",
            make=lambda: running_means(config.steps, config.particles, config.copies, _seed(config, RATES)),
            lines=partial(_lines, config),
        )
        floors = [
            [(run, once("floor", run.step_size, run.ratio, make=partial(settled, run))) for run in runs]
            for runs in (by_step_size, by_ratio)
        ]
        queue = [
            once("queue", each.num_steps, each.pace, make=partial(_queue, config, each, i))
            for i, each in enumerate(denoising)
        ]
        lag = {ratio: once("lag", ratio, make=partial(_lags, config, ratio, i)) for i, ratio in enumerate(LAG_RATIOS)}
    return Results(
        means=means,
        by_step_size=floors[0],
        by_ratio=floors[1],
        queue=[(QueueResult(**result["numbers"]), result["path"]) for result in queue],
        lag={ratio: (result["unweighted"], result["weighted"]) for ratio, result in lag.items()},
    )


def _seed(config: Config, part: int, run: int = 0) -> int:
    """A seed for every run: of one run they are those after `config.seed`."""
    return config.seed + 100 * part + run


def _queue(config: Config, problem: Denoising, run: int) -> dict[str, Any]:
    numbers, path = run_queue(problem, config.copies, config.steps, _seed(config, QUEUE, run))
    error = path.std(1) / path.shape[1] ** 0.5
    return {"numbers": asdict(numbers), "path": torch.stack([path.mean(1), error])}


def _lags(config: Config, ratio: float, run: int) -> dict[str, Tensor]:
    noise = Noise(_seed(config, LAG, run))
    weighted = [lags(ratio, 1, True, noise.stream(1, i)) for i in range(min(WEIGHTED_RUNS, config.copies))]
    return {
        "unweighted": lags(ratio, config.copies, False, noise.stream(0)),
        "weighted": torch.cat(weighted),
    }


def _lines(config: Config, means: Float[Tensor, "records problems copies"]) -> Iterable[dict[str, Any]]:
    """Lines of metrics.jsonl: the running mean of every problem, over its copies."""
    for i, problem in enumerate(PROBLEMS):
        for K, mean in zip(records(config.steps).tolist(), means[:, i].mean(1).tolist(), strict=True):
            yield {"arm": problem.name, "seed": config.seed, "updates": K, "squared_gradient": mean}
