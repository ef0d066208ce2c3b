"""How far particles lag behind θ, without and with weights, on the Gaussian location problem.

θ descends from a distance of D deviations, and the mean of the particles is compared with the one that π_θ has:

    lag = Σ_k (x̄_k − θ_k)(θ_k − a)/Σ_k (θ_k − a)²

over iterations in which the start is forgotten. Unweighted particles have the lag of `linear`, a function of η/h. Under
weights the mean of the particles is that of π_θ, whatever η/h is.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.theory.problems import LOCATION, Copies
from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.samplers import ULA

STEP_SIZE, DISTANCE, FIRST, LAST = 0.2, 8.0, 20, 60  # h, D, and the iterations that count
PARTICLES = 3840


def lags(ratio: float, copies: int, weighted: bool, noise: Noise) -> Float[Tensor, " copies"]:
    """The lag of every copy of one run.

    Args:
        ratio: η/h.
        copies: coordinates of a particle; weights belong to a whole particle, so that a weighted run has one.
        weighted: whether the particles are.
        noise: of the run; X_0 is drawn from π_θ0.
    """
    potential = Copies([LOCATION], torch.full((1, copies), DISTANCE, dtype=torch.float64))
    loop = Single(
        potential,
        ULA(STEP_SIZE),
        ForwardKL(potential.data),
        torch.optim.SGD(potential.parameters(), lr=ratio * STEP_SIZE),
        particles=DISTANCE + noise.normal((PARTICLES, 1, copies), 0, dtype=torch.float64),
        noise=noise.stream(1),
        weighted=weighted,
    )
    behind, distances = [], []
    for k in range(LAST):
        if k >= FIRST:
            particles, theta = loop.particles, potential.theta.detach()[0]
            behind.append((particles.weights @ particles.x[:, 0]) - theta)
            distances.append(theta.clone())
        loop.step()
    v = torch.stack(distances)
    return (torch.stack(behind) * v).sum(0) / v.square().sum(0)
