"""Where a fine-tuned chain loses what it does not capture, row by row, and how much of that is training's fault.

    implicit-diffusion finetune --kl-weight 2.6 --out runs/demo
    python benchmarks/rows.py --run runs/demo       # a table, and results/rows-<processor>.json

With w = R/β − log dP_θ/dP_0 the distance from the bound is J(θ) − J* = β E KL(P_θ ‖ P*), which for small variances is
(β/2) Var(w | x_0). Trajectories that share x_0..x_k and branch there tell the variance that is left at row k,
(β/2) E Var(w | x_0..x_k); its decrease from k to k+1 is the loss of row k. By the envelope theorem the mean of row k is
the best of all Gaussians if r_k = E[λ_{k+1} | x_k] + β Δ_k/s_k² vanishes, Δ_k = b_k (u_θ − u_0): the part of the loss
that a better u_θ would save is about s_k² E|r_k|²/2β. The rest is the shape of the row, which no training mends. The
gain of row k is s_k² E|E[λ_{k+1}|x_k]|²/2β, and the gradient's noise the same of λ_{k+1} less its mean. Squares of
conditional means are products over the two branches, hence without bias.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import hardware, save
from torch import Tensor

from implicit_diffusion import Chain, Noise, PathKL, Reward, read_table
from implicit_diffusion.commands.rewards.names import load_reward
from implicit_diffusion.gradients.adjoint import pull_back, terminal_adjoint
from implicit_diffusion.models.pretrained import load_pretrained

COLUMNS = ("loss", "undertrained", "gain", "noise")


@dataclass(frozen=True)
class Config:
    """Which run, and how many pairs of branches per row."""

    run: Path = Path("runs/demo")
    pairs: int = 768
    chunk: int = 256
    seed: int = 1


@dataclass(frozen=True)
class Problem:
    """What a run trained, and for what."""

    chain: Chain
    reward: Callable[[Tensor], Tensor]
    beta: float


def load(run: Path) -> Problem:
    """The problem of a finished run of `finetune`, with the trained network."""
    config, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "summary"))
    trained, pretrained = load_pretrained(run / "model"), load_pretrained(config["model"])
    options = {"eta": config["eta"]} if config["scheduler"] == "ddim" else {}
    table = read_table(trained.scheduler, config["num_steps"], **options)
    chain = Chain(
        trained.denoiser.requires_grad_(False),
        table,
        trained.event_shape,
        reference=pretrained.denoiser.requires_grad_(False),
        pretrained_rows="noiseless",
    )
    (reward,) = config["reward"]
    return Problem(chain, load_reward(reward), summary["kl_weight"])


def branch(problem: Problem, x: Tensor, row: int, noise: Noise) -> dict[str, Tensor]:
    """From x_row of shape (n, *event), two branches of each: w, λ_{row+1} and βΔ/s², each (2, n, ...)."""
    chain, beta = problem.chain, problem.beta
    objective = Reward(problem.reward) + beta * PathKL()
    n, states, log_ratio, push = len(x), [torch.cat([x, x])[None]], torch.zeros(2 * len(x)), None
    for k in range(row, chain.num_steps):
        with torch.no_grad():
            transition = chain.transition(states[-1], [k], reference=True)
            xi = noise.normal(states[-1].shape, k)
            states.append(transition.push(xi))
        if k not in chain.pretrained_rows:
            assert transition.u0 is not None
            shift = transition.b / transition.s * (transition.u - transition.u0)
            log_ratio += (shift.square() / 2 + shift * xi).flatten(2).sum(-1)[0]
            push = beta * shift / transition.s if k == row else push
    w = problem.reward(states[-1][0]) / beta - log_ratio
    adjoint, _ = terminal_adjoint(objective, states.pop()[0])
    lam = adjoint[None]
    for k in reversed(range(row + 1, chain.num_steps)):
        lam, *_ = pull_back(chain, objective, states.pop(), [k], lam)
    assert push is not None
    return {"w": w.view(2, n), "lam": (2 * n * lam[0]).view(2, n, -1), "push": push[0].view(2, n, -1)}


def measure(problem: Problem, config: Config) -> list[dict[str, float]]:
    """The table: for every trained row its loss and parts in units of the reward, with standard errors."""
    chain, beta = problem.chain, problem.beta
    noise, rows = Noise(config.seed), chain.trained_rows
    found: dict[int, list[dict[str, Tensor]]] = {row: [] for row in rows}
    with chain.evaluating():
        for part in range(config.pairs // config.chunk):
            states = chain.trajectory(noise.stream(0), config.chunk, part)
            for row in rows:
                b = branch(problem, states[row], row, noise.stream(1, part, row))
                half, lam, residual = float(chain.table.s[row]) ** 2 / (2 * beta), b["lam"], b["lam"] + b["push"]
                found[row].append(
                    {
                        "left": beta / 2 * (b["w"][0] - b["w"][1]).square() / 2,
                        "undertrained": half * (residual[0] * residual[1]).sum(1),
                        "gain": half * (lam[0] * lam[1]).sum(1),
                        "noise": half * (lam[0] - lam[1]).square().sum(1) / 2,
                    }
                )
            print(f"{(part + 1) * config.chunk} of {config.pairs} pairs", flush=True)
    values = {row: {name: torch.cat([p[name] for p in parts]) for name in parts[0]} for row, parts in found.items()}
    table = []
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        v = values[row]
        v["loss"] = v["left"] - (values[after]["left"] if after is not None else 0)
        line: dict[str, float] = {"row": row, "t": float(chain.table.t[row]), "s": float(chain.table.s[row])}
        for name in COLUMNS:
            line |= {name: v[name].mean().item(), f"{name}_se": (v[name].std() / len(v[name]) ** 0.5).item()}
        table.append(line)
    return table


def main(config: Config) -> None:
    """Measure, print, write."""
    problem = load(config.run)
    table = measure(problem, config)
    total = {name: sum(line[name] for line in table) for name in COLUMNS}
    print("| row | t | s | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (3 + len(COLUMNS)))
    for line in table:
        cells = (f"{line[name]:.4f} ± {line[f'{name}_se']:.4f}" for name in COLUMNS)
        print(f"| {line['row']} | {line['t']:.0f} | {line['s']:.3f} | " + " | ".join(cells) + " |")
    print("| sum | | | " + " | ".join(f"{total[name]:.3f}" for name in COLUMNS) + " |")
    setting = {"pairs": config.pairs, "seed": config.seed, "beta": problem.beta, "N": problem.chain.num_steps}
    print("wrote", save("rows", hardware() | {"config": setting, "rows": table, "sum": total}))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
