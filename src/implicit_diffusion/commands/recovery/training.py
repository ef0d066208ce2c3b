"""One run of maximum likelihood on mixture weights, and how far it is from the data, exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.shared.hexagon_problem import LOGITS, RADIUS, mixture
from implicit_diffusion.evaluation.quadrature import Grid
from implicit_diffusion.loops import Single, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.samplers import ULA

START, DATA, TRAIN = range(3)  # streams of noise
GRID = Grid(RADIUS + 7, 160)  # for components of deviation one


@dataclass(frozen=True)
class RecoveryRun:
    """One run.

    Args:
        problem: "hexagon" or "two-modes".
        weighted: whether the particles are.
        decreasing: whether the rate is divided by 1 + k/100.
        steps: iterations.
        particles: their number, and that of data per iteration.
        step_size: h of the Langevin steps.
        lr: η of plain gradient steps, at the start.
        seed: of all noise.
    """

    problem: str
    weighted: bool
    decreasing: bool
    steps: int
    particles: int
    step_size: float
    lr: float
    seed: int


def models(problem: str) -> tuple[GaussianMixture, GaussianMixture]:
    """The law of the data, and the model before training."""
    if problem == "hexagon":
        return mixture(torch.tensor(LOGITS)), mixture(torch.zeros(len(LOGITS)))
    means = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
    data, model = GaussianMixture(means, torch.tensor([0.8, 0.2]).log()), GaussianMixture(means)
    model.means.requires_grad_(False)
    return data, model


def train(training: RecoveryRun) -> Float[Tensor, "updates 2"]:
    """Exact KL(data‖model) and KL(model‖data) after every update."""
    noise = Noise(training.seed)
    target, model = models(training.problem)
    sgd = torch.optim.SGD([model.logits], lr=training.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda k: 1 / (1 + k / 100)) if training.decreasing else None
    loop = Single(
        model,
        ULA(training.step_size),
        ForwardKL(target.sample(100_000, noise, DATA), batch=training.particles),
        Update(sgd, schedule=schedule),
        particles=model.sample(training.particles, noise, START),
        noise=noise.stream(TRAIN),
        weighted=training.weighted,
    )
    path = torch.stack([model.logits.detach().clone() for _ in loop.run(training.steps)])
    return exact_kls(target, path)


@torch.no_grad()
def exact_kls(target: GaussianMixture, path: Float[Tensor, "updates modes"]) -> Float[Tensor, "updates 2"]:
    """KL(data‖model) and KL(model‖data) for every θ on a path, by quadrature, in nats."""
    target = target.double()
    components = torch.cdist(GRID.points, target.means).square() / -2  # both laws have the same normaliser
    log_p = (components + target.logits.log_softmax(0)).logsumexp(1)
    near = log_p > log_p.max() - 30
    components, log_p = components[near], log_p[near]
    p, area = log_p.exp(), GRID.area / (math.tau * target.std**2)
    kls = []
    for theta in path.double().log_softmax(1):
        log_q = (components + theta).logsumexp(1)
        kls.append(torch.stack([p @ (log_p - log_q), log_q.exp() @ (log_q - log_p)]) * area)
    return torch.stack(kls)
