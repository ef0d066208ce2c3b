"""How an energy-based model is trained, in every arm.

    weighted    the single loop with weighted particles: exact up to O(1/n), although θ moves
    hmc         the same kernel and loop without weights
    implicit    the single loop as in the paper: one Langevin step, one step on θ, both from one backward pass
    cd          contrastive divergence: k Langevin steps from data, then one step on θ
    pcd         persistent contrastive divergence: k Langevin steps from where the particles are, then one step on θ

Arms are compared at equal numbers of pulls through V at all particles.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.loops import NestedParticles, Single, Update
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.models.energy_model import Architecture, EnergyModel, Moves
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.runs.fit import Fit
from implicit_diffusion.samplers.replicas import Replicas, annealed
from implicit_diffusion.samplers.weighted_state import systematic

ARMS = ("weighted", "hmc", "implicit", "cd", "pcd")
LANGEVIN_STEPS = 5  # per update, of cd and pcd
LANGEVIN = Moves("ula", 0.01)  # of implicit, cd and pcd
REFRESH_STEPS, GROUPS = 50, 8  # of the annealing that draws particles afresh, and its replicates
NETWORK, TRAIN, START, ANNEAL, SCORES = range(2, 7)  # streams of noise beside the data's


@dataclass(frozen=True)
class ScoreStart:
    """A start by score matching.

    Args:
        updates: of θ.
        noise_std: σ, in standardised coordinates.
    """

    updates: int
    noise_std: float


@dataclass(frozen=True)
class Settings:
    """One training.

    Args:
        architecture: of the potential.
        moves: the sampler.
        arm: one of `ARMS`; "weighted" and "hmc" use `moves`, the others Langevin steps of their own.
        particles: n, as many as data per update.
        updates: of θ.
        lr: of Adam at the start; it decays to zero along a cosine.
        seed: of all random numbers.
        weight_decay: of AdamW.
        refresh: updates after which weighted particles are drawn afresh by annealing; 0 for never.
        adapt: whether the step size of `moves` is adapted while θ moves.
        start: what comes before the particles; None to begin with them, at the Gaussian.
    """

    architecture: Architecture
    moves: Moves
    arm: str
    particles: int
    updates: int
    lr: float
    seed: int
    weight_decay: float = 0.0
    refresh: int = 0
    adapt: bool = False
    start: ScoreStart | None = None

    @property
    def description(self) -> str:
        """A name in a word or two: that of the sampler for arms that use `moves`."""
        weighted = "weighted " if self.arm == "weighted" else ""
        return f"{weighted}{self.moves.sampler}" if self.arm in ("weighted", "hmc") else self.arm


def make_loop(settings: Settings, data: Data) -> ParticleLoop:
    """The loop of an arm, before its first step.

    Raises:
        InvalidInputError: a kernel without increments where the particles have weights, or settings that do not fit.
    """
    noise = Noise(settings.seed)
    potential = settings.architecture.build(noise.stream(NETWORK))
    adam = torch.optim.AdamW(
        potential.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    update = Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.updates))
    objective = ForwardKL(data.standardised()[0], batch=settings.particles)
    if settings.arm in ("weighted", "hmc", "implicit"):
        return Single(
            potential,
            (LANGEVIN if settings.arm == "implicit" else settings.moves).kernel(),
            objective,
            update,
            particles=settings.particles,
            noise=noise.stream(TRAIN),
            weighted=settings.arm == "weighted",
        )
    return NestedParticles(
        potential,
        LANGEVIN.kernel(),
        objective,
        update,
        particles=settings.particles,
        noise=noise.stream(TRAIN),
        inner_steps=LANGEVIN_STEPS,
        begin="data" if settings.arm == "cd" else "last",
    )


def pulls_per_update(arm: str, moves: Moves) -> int:
    """Pulls through V at all particles that one update of an arm costs."""
    if arm in ("weighted", "hmc"):
        return moves.kernel().evaluations_per_step + (arm == "weighted")
    return 1 if arm == "implicit" else LANGEVIN_STEPS + 1


@dataclass(frozen=True)
class Refresh:
    """Callback: every `settings.refresh` updates, draw the particles afresh by annealing from the Gaussian to V_θ.

    That removes the errors that their weights, log Z and the masses of modes have accumulated.
    """

    settings: Settings

    def __call__(self, fit: Fit) -> None:
        every, loop = self.settings.refresh, fit.loop
        if not every or fit.updates % every or fit.updates >= self.settings.updates:
            return
        assert isinstance(loop, ParticleLoop)
        began, replicas = time.monotonic(), redrawn(self.settings, loop, fit.updates)
        loop.refresh(replicas.particles(loop.model), gradient_evaluations=replicas.gradient_evaluations)
        fit.seconds += time.monotonic() - began


def redrawn(settings: Settings, loop: ParticleLoop, updates: int) -> Replicas:
    """As many particles as the loop has, annealed from the Gaussian to its V_θ.

    Args:
        settings: of the training.
        loop: at present.
        updates: so far, for the noise.
    """
    assert isinstance(loop.model, Tilted)
    path, kernel = loop.model.tempered, moved(settings, loop).kernel()
    noise = Noise(settings.seed).stream(ANNEAL, updates)
    return annealed(path, kernel, loop.n, noise, steps=REFRESH_STEPS, groups=GROUPS)


def moved(settings: Settings, loop: ParticleLoop) -> Moves:
    """The sampler with its step size at present, which may have been adapted."""
    moves = settings.moves if settings.arm in ("weighted", "hmc") else LANGEVIN
    return replace(moves, step_size=moves.step_size * loop.step_scale)


def to_model(settings: Settings, loop: ParticleLoop, data: Data) -> EnergyModel:
    """The model at present; weighted particles are resampled to equal weights."""
    potential = loop.model
    assert isinstance(potential, Tilted)
    x, log_weights = loop.particles.x, loop.particles.log_weights
    if log_weights is not None:
        uniform = torch.rand((), generator=Noise(settings.seed).generator(START))
        x = x[systematic(log_weights, uniform)]
    moves = moved(settings, loop)
    lattice = data.lattice if data.dequantised else None
    return EnergyModel(settings.architecture, potential, data.shift, data.scale, moves, x.detach(), lattice=lattice)
