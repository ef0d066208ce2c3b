"""How an energy-based model is trained, in every arm, and when its training has gone wrong.

    weighted    the single loop with weighted particles: exact up to O(1/n) though θ moves
    hmc         the same kernel and loop without weights
    implicit    the single loop as in the paper: one Langevin step, one step on θ, both from one backward pass
    cd          contrastive divergence: k Langevin steps from data, then one step on θ
    pcd         persistent contrastive divergence: k Langevin steps from where the particles are, then one step on θ

Arms are compared at equal numbers of pulls through V at all particles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import DivergenceError
from implicit_diffusion.experiments.ebm_data import Data
from implicit_diffusion.experiments.energy_model import Architecture, EnergyModel, Moves
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.loops import NestedParticles, Single, Update
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.potentials import Tilted
from implicit_diffusion.runs.fit import Fit
from implicit_diffusion.samplers.followers import annealed
from implicit_diffusion.samplers.resampling import systematic

ARMS = ("weighted", "hmc", "implicit", "cd", "pcd")
INNER = 5  # Langevin steps per update of cd and pcd
LANGEVIN = Moves("ula", 0.01)  # of implicit, cd and pcd
REFRESHING, GROUPS = 50, 8  # steps of annealing, and its replicates
NETWORK, TRAIN, START, ANNEAL = range(2, 6)  # streams of noise beside the data's


@dataclass(frozen=True)
class Settings:
    """One training.

    Args:
        moves: the sampler.
        arm: one of `ARMS`; "weighted" and "hmc" take `moves`, the others Langevin steps of their own.
        particles: n, as many as data per update.
        updates: of θ.
        lr: of Adam at the start; cosine decay to zero.
        seed: of all noise.
        weight_decay: of AdamW.
        refresh: updates after which weighted particles are drawn anew by annealing; 0 for never.
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

    @property
    def description(self) -> str:
        """In a word or two: the arms that take `moves` go by their sampler."""
        weighted = "weighted " if self.arm == "weighted" else ""
        return f"{weighted}{self.moves.sampler}" if self.arm in ("weighted", "hmc") else self.arm


def make_loop(settings: Settings, data: Data) -> ParticleLoop:
    """The loop of an arm, before its first step.

    Raises:
        InvalidInputError: a kernel without increments where weights are asked for, and whatever else does not fit.
    """
    noise = Noise(settings.seed)
    potential = settings.architecture.build(noise.stream(NETWORK))
    adam = torch.optim.AdamW(
        potential.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    update = Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.updates))
    shared: tuple[Any, ...] = (ForwardKL(data.standardised()[0], batch=settings.particles), update)
    options: dict[str, Any] = {"particles": settings.particles, "noise": noise.stream(TRAIN)}
    if settings.arm in ("weighted", "hmc"):
        return Single(potential, settings.moves.kernel(), *shared, weighted=settings.arm == "weighted", **options)
    if settings.arm == "implicit":
        return Single(potential, LANGEVIN.kernel(), *shared, **options)
    options |= {"inner_steps": INNER, "begin": {"cd": "data", "pcd": "last"}[settings.arm]}
    return NestedParticles(potential, LANGEVIN.kernel(), *shared, **options)


def pulls_per_update(arm: str, moves: Moves) -> int:
    """Pulls through V at all particles that one update of an arm costs."""
    kernel = moves.kernel().evaluations
    return {"weighted": kernel + 1, "hmc": kernel, "implicit": 1, "cd": INNER + 1, "pcd": INNER + 1}[arm]


@dataclass(frozen=True)
class Refresh:
    """Callback: every so often, draw the particles anew by annealing from the Gaussian to the present potential.

    That ends what they have accumulated: the errors of their weights, of log Z, and of the masses of modes.
    """

    settings: Settings

    def __call__(self, fit: Fit) -> None:
        every, loop = self.settings.refresh, fit.loop
        if not every or fit.updates % every or fit.updates >= self.settings.updates:
            return
        assert isinstance(loop, ParticleLoop) and isinstance(loop.model, Tilted)
        began, noise = time.monotonic(), Noise(self.settings.seed).stream(ANNEAL, fit.updates)
        path, kernel = loop.model.tempered, self.settings.moves.kernel()
        followers = annealed(path, kernel, loop.n, noise, steps=REFRESHING, groups=GROUPS)
        loop.refresh(followers.particles(loop.model))
        loop.evaluations += followers.evaluations
        fit.seconds += time.monotonic() - began


@dataclass
class Watch:
    """Callback: stop when training diverges, and keep the last state that was sound.

    Two things go wrong in maximum likelihood by sampling. Particles leave: the network has out-grown the Gaussian, V is
    not bounded below, and there is no π_θ. Or the energies of data and particles run apart: particles no longer are
    where π_θ is, so nothing holds the difference back.

    Args:
        data: standardised, to compare with.
        every: updates between two looks.
        patience: bad looks in a row that stop.
        save: called at every sound look; None where nothing is kept.

    Raises:
        DivergenceError: when called, in plain words with what to change.
    """

    data: Tensor
    every: int = 20
    patience: int = 2
    save: Callable[[Fit], None] | None = None
    bad: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.data = self.data[:1000]
        self.radius = self.data.flatten(1).norm(dim=1).amax().item()

    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.every == 0:
            self.look(fit, self.patience)

    def look(self, fit: Fit, patience: int = 1) -> None:
        """Look now; by default a single bad look stops, as at the end of a training, whose result would be used."""
        loop = fit.loop
        assert isinstance(loop, ParticleLoop)
        found = self.diagnose(loop, fit.metrics.get("acceptance"))
        self.bad = self.bad + 1 if found else 0
        if found and self.bad >= patience:
            raise DivergenceError(f"update {fit.updates}: {found}")
        if not found and self.save is not None:
            self.save(fit)

    def unsound(self, fit: Fit) -> str | None:
        """What has gone wrong, if anything: no such state is saved."""
        assert isinstance(fit.loop, ParticleLoop)
        return self.diagnose(fit.loop, fit.metrics.get("acceptance"))

    def state_dict(self) -> dict[str, int]:
        """How many bad looks in a row there were."""
        return {"bad": self.bad}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.bad = state["bad"]

    @torch.no_grad()
    def diagnose(self, loop: ParticleLoop, acceptance: float | Tensor | None = None) -> str | None:
        """What has gone wrong, if anything."""
        x = loop.walkers.x
        far = (x.flatten(1).norm(dim=1) > 10 * self.radius).sum().item()
        if far > 0.01 * len(x):
            return (
                f"{far} of {len(x)} particles are more than ten times as far out as any datum: V is not bounded below, "
                "or the sampler is unstable. Take a smaller --lr or --step-size, or add --weight-decay"
            )
        with eval_mode(loop.model):
            data, particles = loop.model(self.data), loop.model(x)
        gap = data.mean() - loop.particles.mean(particles)
        usual = math.sqrt(math.prod(x.shape[1:]) / 2)  # deviation of −log p under p, of a Gaussian of that dimension
        spread = min(max(data.std().item(), usual), 10 * usual)  # of a sound model; it would grow with what runs away
        if not gap.abs() < 10 * spread:
            return (
                f"the mean energy of the data is {gap:.3g} from that of the particles, {gap.abs() / spread:.0f} times "
                "its spread: particles are not where the model is. Take a smaller --lr, --weighted, or more --particles"
            )
        if acceptance is not None and acceptance < 0.01:
            return (
                f"{acceptance:.1%} of the proposals are accepted: particles stand still, and Γ means nothing. Take a "
                "smaller --step-size or --lr"
            )
        return None


def to_model(settings: Settings, loop: ParticleLoop, data: Data) -> EnergyModel:
    """The model as it stands; weighted particles are resampled to equal weights."""
    potential = loop.model
    assert isinstance(potential, Tilted)
    held = loop.particles
    x = held.x
    if held.log_weights is not None:
        uniform = torch.rand((), generator=Noise(settings.seed).generator(START))
        x = x[systematic(held.log_weights, uniform)]
    moves = settings.moves if settings.arm in ("weighted", "hmc") else LANGEVIN
    lattice = data.lattice if data.dequantised else None
    return EnergyModel(settings.architecture, potential, data.shift, data.scale, moves, x.detach(), lattice=lattice)
