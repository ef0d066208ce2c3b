"""One reward training of an energy-based model, from particles that stand for π_0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.loops import Single, Update
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ReverseKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.replicas import annealed
from implicit_diffusion.samplers.weighted_state import systematic

START, TRAIN, CHOOSE = range(3)  # streams of noise
ANNEALING = 200  # steps


@dataclass(frozen=True)
class TiltRun:
    """One run.

    Args:
        weight: w of the KL, in reward per nat.
        weighted: whether the particles are.
        steps: updates of θ.
        lr: of Adam at the start; it decays to zero along a cosine.
        seed: of all noise.
    """

    weight: float
    weighted: bool
    steps: int
    lr: float
    seed: int


def train(training: TiltRun, model: EnergyModel, start: Particles, reward: Callable[[Tensor], Tensor]) -> EnergyModel:
    """The model after training, without its log Z.

    Args:
        training: what to do.
        model: π_0, which is left as it is.
        start: weighted particles that stand for π_0, in the model's coordinates.
        reward: R of points in the data's units, (n, 2) ↦ (n,).

    Raises:
        NonFiniteError: NaN or infinity, with options to change.
    """
    noise = Noise(training.seed)
    potential = model.architecture.build(Noise(0))
    potential.load_state_dict(model.potential.state_dict())
    particles = start if training.weighted else resampled(start, noise)

    def in_data_units(z: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        return reward((z * model.scale + model.shift).to(z))  # in the precision in which the grid was seen

    adam = torch.optim.Adam(potential.parameters(), lr=training.lr, betas=(0.9, 0.99))
    try:
        with GlobalGenerators(noise, TRAIN, 0):
            loop = Single(
                potential,
                model.moves.kernel(),
                Reward(in_data_units) + training.weight * ReverseKL.to_initial(potential),
                Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, training.steps)),
                particles=particles.x,
                noise=noise.stream(TRAIN),
                weighted=training.weighted,
            )
            loop.refresh(particles)
            for _ in loop.run(training.steps):
                pass
    except NonFiniteError as error:
        arm = "weighted" if training.weighted else "unweighted"
        raise NonFiniteError(
            f"w = {training.weight:g}, {arm}, seed {training.seed}: {error}. Use a smaller --lr"
        ) from error
    return replace(model, potential=potential, particles=resampled(loop.particles, noise).x, log_z=None, log_z_se=None)


def at_model(model: EnergyModel, n: int, noise: Noise) -> Particles:
    """Particles that annealing brings to π_0, with their weights, without log Z."""
    replicas = annealed(model.potential.tempered, model.moves.kernel(), n, noise.stream(START), steps=ANNEALING)
    particles = replicas.particles(model.potential)
    return Particles(particles.x, particles.log_weights)


def resampled(particles: Particles, noise: Noise) -> Particles:
    """The same law in particles of equal weight."""
    if particles.log_weights is None:
        return particles
    uniform = torch.rand((), generator=noise.generator(CHOOSE))
    return Particles(particles.x[systematic(particles.log_weights, uniform)])
