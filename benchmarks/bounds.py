"""How much the share captured depends on how J* was estimated: one run of `finetune` beside several bounds.

    implicit-diffusion finetune --kl-weight 2.6 --out runs/demo
    python benchmarks/bounds.py --run runs/demo     # a table, and results/bounds-<processor>.json

J* = E −β log E_{u_0}[e^{R/β} | x_0] may be estimated from pretrained trajectories alone: given x_0 from M of them, by
the plain log of a mean, which is too modest by O(1/M), or with a jackknife; or from all trajectories together, which
for a chain that forgets its start is the same number. Rare rewards carry e^{R/β}, so that all of these miss some of it
more often than not. The sharp bound, which `summary.json` tells, weighs the trained chain's trajectories instead.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from common import hardware, save
from rows import load
from torch import Tensor

from implicit_diffusion import Noise, evaluate
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import bound
from implicit_diffusion.evaluation.chains import mean_and_error


@dataclass(frozen=True)
class Config:
    """Which run, and how many pretrained trajectories."""

    run: Path = Path("runs/demo")
    starts: int = 2048
    repeats: int = 16
    seed: int = 1


def plain(reward: Tensor, beta: float) -> tuple[float, float]:
    """J_0 − J* by the log of the mean of e^{R/β} over each start's trajectories, and its standard error."""
    soft = beta * ((reward / beta).logsumexp(1) - math.log(reward.shape[1]))
    return mean_and_error(soft - reward.mean(1))


def bounded(evaluation: Evaluation, beta: float, conditional: bool) -> tuple[float, float]:
    """The same by `bound`. Its error is that of J*, with J_0's own in it."""
    found = bound(evaluation, beta, conditional=conditional)
    return -evaluation.reward.double().mean().item() - found.j, found.j_se


def main(config: Config) -> None:
    """Estimate, print, write."""
    problem = load(config.run)
    summary = json.loads((config.run / "summary.json").read_text())
    gained = summary["j_before"] - summary["j_after"]
    sizes = {"starts": config.starts, "repeats": config.repeats}
    found = evaluate(problem.chain.pretrained(), problem.reward, Noise(config.seed).stream(2), **sizes)
    gains = {"sharp": (gained / summary["captured"], gained * summary["captured_se"] / summary["captured"] ** 2)}
    gains["pretrained, all together"] = bounded(found, problem.beta, conditional=False)
    gains[f"pretrained given x_0, M = {config.repeats}, jackknife"] = bounded(found, problem.beta, conditional=True)
    for few in (config.repeats, config.repeats // 2):
        gains[f"pretrained given x_0, M = {few}, plain"] = plain(found.reward[:, :few].double(), problem.beta)
    rows = []
    print("| J* | J_0 − J* | captured |\n|---|---|---|")
    for name, (gain, error) in gains.items():
        share, share_error = gained / gain, gained * error / gain**2
        rows.append({"bound": name, "gain": gain, "gain_se": error, "captured": share, "captured_se": share_error})
        print(f"| {name} | {gain:.3f} ± {error:.3f} | {share:.3f} ± {share_error:.3f} |", flush=True)
    setting = {**sizes, "seed": config.seed, "beta": problem.beta, "N": problem.chain.num_steps}
    print("wrote", save("bounds", hardware() | {"config": setting, "rows": rows}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
