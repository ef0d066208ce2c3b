"""Learn a distribution back: maximum likelihood of mixture weights in a single loop, against the exact KL.

    hexagon     data from the hexagon at θ_0, training from equal weights
    two-modes   modes at (±4, 0), data weights (.8, .2), training from (.5, .5): particles cannot cross

Each with unweighted and with weighted particles, at a constant rate and at one that decreases like 1/k: that of
Robbins and Monro, which averages over ever more of the particles' noise, and still goes any distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.hexagon.problem import LOGITS, Exact, mixture
from implicit_diffusion.commands.shared.inputs import inputs, record_inputs
from implicit_diffusion.commands.shared.ranges import at_least, positive
from implicit_diffusion.commands.shared.studies import Study
from implicit_diffusion.loops import Single, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.runs.provenance import is_recorded
from implicit_diffusion.samplers import ULA

START, DATA, TRAIN = range(3)  # streams of noise
ARMS = ("unweighted", "weighted", "unweighted-decreasing", "weighted-decreasing")
TAIL = 500  # updates whose mean is reported


@dataclass(frozen=True)
class Config:
    """Learn the weights of a mixture from data, by maximum likelihood in a single loop."""

    problem: Literal["hexagon", "two-modes"] = "hexagon"
    """The data: "hexagon" has six modes that particles can cross between. "two-modes" has two that they cannot."""
    steps: int = 5000
    """Number of iterations."""
    particles: int = 1000
    """Number of particles, and of data per iteration, which are drawn afresh from 100,000."""
    seeds: int = 5
    """Number of runs of every arm."""
    seed: int = 0
    """Seed of the first run; the others count on from it."""
    step_size: float | None = None
    """Step size h of the Langevin steps; 0.2 on the hexagon, 0.05 for two modes by default."""
    lr: float = 0.1
    """Step size η of plain gradient steps; the "decreasing" arms divide it by 1 + k/100."""
    out: Path | None = None
    """Folder for the run, new or empty. By default runs/recovery-<time>."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        at_least(self, steps=TAIL, particles=2, seeds=1, seed=0)
        positive(self, "step_size", "lr")


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """All arms and seeds, summary, figure; returns the summary.

    Args:
        config: see there.
        directory: of an interrupted study to go on with; None begins a new one.
    """
    config.check()
    h = {"hexagon": 0.2, "two-modes": 0.05}[config.problem] if config.step_size is None else config.step_size
    begun = directory is not None
    out = directory.path if directory else config.out or dated("recovery")
    directory = RunDirectory(out.absolute())
    config = replace(config, step_size=h, out=directory.path)
    with directory.held():
        if not begun:
            directory.start(config)
        if not (begun and is_recorded(directory)):
            record_inputs(directory, config, inputs(config))
        with directory.resumable():
            return _finish(config, _study(config, Study(directory)), directory)


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the figure again, and write and print the numbers, from what was found."""
    values = directory.read_config() or {}
    config = Config(**values | {"out": directory.path})
    return _finish(config, _study(config, Study(directory)), directory)


def _study(config: Config, study: Study) -> dict[str, Float[Tensor, "seeds updates 2"]]:
    """The exact divergences of every arm."""
    curves = {}
    with progress(len(ARMS) * config.seeds, "recovery") as bar:
        for name in ARMS:
            runs = []
            for seed in range(config.seed, config.seed + config.seeds):
                runs.append(study.once(name, seed, make=partial(train, config, name, seed)))
                bar.update()
            curves[name] = torch.stack(runs)
    return curves


def _finish(config: Config, curves: dict[str, Tensor], directory: RunDirectory) -> dict[str, Any]:
    target, start = models(config.problem)
    before = exact_kls(target, start.logits.detach()[None])[0]
    arms = {name: _summarise(runs[:, -TAIL:].mean(1)) for name, runs in curves.items()}
    summary = {"kl_before": before[0].item(), "kl_to_data_before": before[1].item(), "arms": arms}
    plot(curves, before[0].item(), directory.figure("kl"))
    directory.write_summary(summary)  # the last file: with it, the run is finished
    print(f"exact KL(data‖model) and KL(model‖data), mean of the last {TAIL} updates (lowest – highest seed)")
    print(f"  {'before training':22s} {before[0]:.4f}  {before[1]:.4f}")
    for name, arm in arms.items():
        low, high = arm["kl_range"]
        print(f"  {name:22s} {arm['kl']:.2e}  {arm['kl_to_data']:.2e}   ({low:.1e} – {high:.1e})")
    print(f"run       {directory.path}")
    return summary


def _summarise(runs: Float[Tensor, "seeds 2"]) -> dict[str, Any]:
    forward, reverse = runs.mean(0).tolist()
    return {"kl": forward, "kl_to_data": reverse, "kl_range": [runs[:, 0].min().item(), runs[:, 0].max().item()]}


def models(problem: str) -> tuple[GaussianMixture, GaussianMixture]:
    """The law of the data, and the model before training."""
    if problem == "hexagon":
        return mixture(torch.tensor(LOGITS)), mixture(torch.zeros(len(LOGITS)))
    means = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
    data, model = GaussianMixture(means, torch.tensor([0.8, 0.2]).log()), GaussianMixture(means)
    model.means.requires_grad_(False)
    return data, model


def train(config: Config, name: str, seed: int) -> Float[Tensor, "updates 2"]:
    """Exact KL(data‖model) and KL(model‖data) after every update."""
    noise = Noise(seed)
    target, model = models(config.problem)
    sgd = torch.optim.SGD([model.logits], lr=config.lr)
    decreasing = name.endswith("decreasing")
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda k: 1 / (1 + k / 100)) if decreasing else None
    assert config.step_size is not None
    loop = Single(
        model,
        ULA(config.step_size),
        ForwardKL(target.sample(100_000, noise, DATA), batch=config.particles),
        Update(sgd, schedule=schedule),
        particles=model.sample(config.particles, noise, START),
        noise=noise.stream(TRAIN),
        weighted=name.startswith("weighted"),
    )
    path = torch.stack([model.logits.detach().clone() for _ in loop.run(config.steps)])
    return exact_kls(target, path)


@torch.no_grad()
def exact_kls(target: GaussianMixture, path: Float[Tensor, "updates modes"]) -> Float[Tensor, "updates 2"]:
    """KL(data‖model) and KL(model‖data) for every θ on a path, by quadrature."""
    grid, target = Exact(points=160), target.double()
    components = torch.cdist(grid.grid, target.means).square() / -2  # both laws have the same normaliser
    log_p = (components + target.logits.log_softmax(0)).logsumexp(1)
    near = log_p > log_p.max() - 30
    components, log_p = components[near], log_p[near]
    p, area = log_p.exp(), grid.cell**2 / (math.tau * target.std**2)
    kls = []
    for theta in path.double().log_softmax(1):
        log_q = (components + theta).logsumexp(1)
        kls.append(torch.stack([p @ (log_p - log_q), log_q.exp() @ (log_q - log_p)]) * area)
    return torch.stack(kls)


def plot(curves: dict[str, Tensor], before: float, path: Path) -> None:
    """Exact KL against updates, a band over seeds per arm."""
    from implicit_diffusion.commands.shared.drawing import finish, legend_above, sheet

    figure = sheet(6.4, 4)
    axis = figure.subplots()
    for name, runs in curves.items():
        ys = runs[..., 0].clamp(min=1e-7)
        colour = "#2a9d5c" if name.startswith("weighted") else "#1f6f8b"
        style = "--" if name.endswith("decreasing") else "-"
        axis.plot(ys.log().mean(0).exp(), color=colour, ls=style, lw=1.5, label=name)
        if not name.endswith("decreasing"):
            axis.fill_between(range(ys.shape[1]), ys.amin(0), ys.amax(0), color=colour, alpha=0.15, lw=0)
    axis.axhline(before, color="0.5", ls=":", lw=1)
    axis.set(yscale="log", xlabel="updates", ylabel="exact KL(data‖model), nats", title="Geometric means over seeds")
    legend_above(axis, columns=2)
    finish(figure, path, [axis])
