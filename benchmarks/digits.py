"""Results on digits: brightness at three KL weights and a non-linear reward, three seeds each, N = 10 and 50.

    python benchmarks/digits.py [--out runs/digits] [--jobs 2] [--steps 10 50]

Runs `implicit-diffusion finetune` with its defaults but for the number of trajectories that judge, `jobs` runs side by
side on one thread each, and writes a table and benchmarks/results/digits-<processor>.json. Finished runs are not
repeated.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import hardware, save

BETAS = {"0.5 σ": 5.3, "1 σ": 2.6, "2 σ": 1.4}  # of brightness, by the gain that the bound allows
STARTS = {10: 640, 50: 128}  # for judging, 8 trajectories from each: 640 bring J* at 1 σ to one per cent
COLUMNS = ("captured", "reward_before", "reward_after", "path_kl", "j_before", "j_after", "j_bound", "j_bound_se")


@dataclass(frozen=True)
class Config:
    """Where, how many at once, and which chains."""

    out: Path = Path("runs/digits")
    jobs: int = 2
    steps: tuple[int, ...] = (10, 50)
    seeds: int = 3


def arms(config: Config) -> dict[str, list[str]]:
    """Name and options of every run."""
    runs = {}
    for steps in config.steps:
        rewards = [(f"brightness, {gain}", ["--kl-weight", str(beta)]) for gain, beta in BETAS.items()]
        if steps == 10:
            rewards.append(("digit-3, 1 σ", ["--reward", "digit-3"]))
        for name, options in rewards:
            for seed in range(config.seeds):
                common = ["--num-steps", str(steps), "--seed", str(seed), "--starts", str(STARTS.get(steps, 256))]
                runs[f"N={steps}, {name}, seed {seed}"] = [*options, *common]
    return runs


def run(name: str, options: list[str], folder: Path) -> dict:
    """The summary of one run, made now or before."""
    if not (folder / "summary.json").exists():
        call = [sys.executable, "-m", "implicit_diffusion", "finetune", *options, "--out", str(folder)]
        log = folder.parent / f"{folder.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            subprocess.run(call, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    summary = json.loads((folder / "summary.json").read_text())
    print(f"{name}: captured {summary['captured']:.3f} ± {summary['captured_se']:.3f}", flush=True)
    return summary


def main(config: Config) -> None:
    """Run what is missing, then print and write the table."""
    todo = arms(config)
    folders = {name: config.out / name.replace(", ", "_").replace(" ", "-").replace("σ", "sd") for name in todo}
    with ThreadPoolExecutor(config.jobs) as pool:
        summaries = dict(zip(todo, pool.map(lambda name: run(name, todo[name], folders[name]), todo)))
    groups: dict[str, list[dict]] = {}
    for name, summary in summaries.items():
        groups.setdefault(name.rpartition(", seed")[0], []).append(summary)
    rows = []
    for name, group in groups.items():
        row = {"arm": name, "kl_weight": statistics.mean(s["kl_weight"] for s in group)}
        for column in (*COLUMNS, "seconds"):
            values = [s[column] for s in group]
            row[column] = statistics.mean(values)
            row[f"{column}_range"] = [min(values), max(values)]
        row["captured_se"] = max(s["captured_se"] for s in group)
        rows.append(row)
        print(
            f"{name:24s} β {row['kl_weight']:.3g}  captured {row['captured']:.3f} {row['captured_range']}  reward "
            f"{row['reward_before']:.4g} → {row['reward_after']:.4g}  KL {row['path_kl']:.3f}  {row['seconds']:.0f} s"
        )
    save("digits", {"hardware": hardware(), "rows": rows, "runs": summaries})


if __name__ == "__main__":
    main(tyro.cli(Config))
