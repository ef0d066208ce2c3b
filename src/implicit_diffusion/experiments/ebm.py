"""Train an energy-based model by maximum likelihood in a single loop; on the plane, say exactly how good it is.

    load → build V = Gaussian + network → weighted particles and a watch → log Z by annealing → save → figures

minimising KL(p_ref‖π_θ). `--compare` runs all arms at equal cost, with their learning rates searched on a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments.ebm_arms import Refresh, Settings, Watch, make_loop, to_model
from implicit_diffusion.experiments.ebm_data import Data, load
from implicit_diffusion.experiments.energy_model import Architecture, EnergyModel, Moves
from implicit_diffusion.experiments.planar import Quadrature
from implicit_diffusion.loops.diagnostics import advice
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.fit import Fit, fit
from implicit_diffusion.samplers.followers import annealed

LOOKS = 12  # exact figures on the way
ANNEALING = 1600, 200  # particles and steps
JUDGE = 7  # a stream of noise beside those of data and training


@dataclass(frozen=True)
class Config:
    """Train an energy-based model by maximum likelihood in a single loop."""

    data: str = "moons"
    """"moons", "circles", "checkerboard", "eight-gaussians" (masses 1:2:…:8), "two-spirals", "digits", or FILE.npy with
    shape (m, d) or (m, channels, height, width)."""
    potential: Literal["mlp", "conv"] | None = None
    """The network beside the Gaussian; by default mlp for vectors, conv for images."""
    sampler: Literal["ula", "mala", "underdamped", "hmc"] = "hmc"
    """The kernel that moves the particles, once per update."""
    weighted: bool = True
    """Weigh the particles for the motion of θ: right masses of modes, and log Z. Underdamped has no weights."""
    steps: int | None = None
    """Updates of θ; 1000 on the plane, 4000 for the rest by default."""
    particles: int = 1000
    """n, and data per update."""
    step_size: float | None = None
    """h in standardised coordinates: by default 0.06 on the plane and 0.2 elsewhere for hmc, about its square for
    ula and mala."""
    leapfrogs: int = 4
    """Of hmc. Together with the step size they should carry a particle through its mode."""
    refresh: int = 250
    """Updates after which weighted particles are drawn anew by annealing, which ends the errors that their weights
    have accumulated; 0 for never."""
    lr: float = 3e-3
    """Of Adam at the start; cosine decay to zero."""
    weight_decay: float = 0.0
    """Of AdamW; holds a network down that out-grows the Gaussian."""
    width: int | None = None
    """Of the network; 64 for mlp (three hidden layers), 16 channels for conv by default."""
    compare: bool = False
    """Run all arms of the comparison at equal cost instead: laws of the plane only."""
    seeds: int = 5
    """Of the comparison."""
    seed: int = 0
    out: Path | None = None
    """Run directory, new or empty. By default runs/ebm-<data>-<time>."""

    def check(self) -> None:
        """Raise `InvalidInputError` where a number is out of range."""
        least_of = {"steps": 1, "particles": 16, "leapfrogs": 1, "width": 1, "seeds": 1, "seed": 0, "refresh": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInputError(f"--{name} must be an integer ≥ {least}, got {value}")
        if self.weighted and self.particles % 8:
            raise InvalidInputError(f"--particles must be a multiple of 8, got {self.particles}")
        for name in ("step_size", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidInputError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise InvalidInputError(f"--weight-decay must be finite and ≥ 0, got {self.weight_decay}")

    def settings(self, data: Data) -> Settings:
        """What to train on these data."""
        kind = self.potential or ("mlp" if len(data.event_shape) == 1 else "conv")
        architecture = Architecture(kind, data.event_shape, self.width or {"mlp": 64, "conv": 16}[kind])
        h = 0.06 if len(data.event_shape) == 1 else 0.2
        default = {"hmc": h, "underdamped": h, "ula": h**2, "mala": h**2}[self.sampler]
        return Settings(
            architecture,
            Moves(self.sampler, self.step_size or default, self.leapfrogs),
            "weighted" if self.weighted else "hmc",
            self.particles,
            self.steps or (1000 if data.law else 4000),
            self.lr,
            self.seed,
            weight_decay=self.weight_decay,
            refresh=self.refresh if self.weighted else 0,
        )


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """Train, judge, save, draw; returns the summary.

    Args:
        config: see there.
        directory: of an interrupted run to go on with; None begins a new one.

    Raises:
        InvalidInputError: bad options or data, before anything is trained.
        DivergenceError: training ran away; the last sound model is in the run directory.
    """
    config.check()
    if config.compare:
        from implicit_diffusion.experiments.ebm_compare import compare

        return compare(config)
    out = config.out or Path(f"runs/ebm-{Path(config.data).stem}-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    if directory is None:
        RunDirectory.check(out)
    data = load(config.data, Noise(config.seed))
    settings = config.settings(data)
    loop = make_loop(settings, data)
    directory = directory or RunDirectory.create(out)
    width, h = settings.architecture.width, settings.moves.step_size
    directory.write_config(replace(config, out=out, steps=settings.updates, width=width, step_size=h))
    trained = train(settings, data, loop, directory)
    if trained.fit.stopped == "interrupted":
        raise KeyboardInterrupt(f"interrupted; go on with `implicit-diffusion resume {directory.path}`")
    summary = judge(trained, data) | {"advice": advice(loop, trained.fit.metrics)}
    model = trained.model.with_log_z(summary["log_z_estimate"], summary["log_z_estimate_se"])
    if "log_z" in summary:
        model = model.with_log_z(summary["log_z"], 0.0)
    model.save(directory.model)
    if data.event_shape == (1, 8, 8):
        from implicit_diffusion.experiments.ebm_digits import judge_digits

        summary |= judge_digits(model, data, directory, settings.updates, config.seed)
    directory.write_summary(summary)

    from implicit_diffusion.experiments.ebm_figures import draw

    draw(model, data, summary, directory)
    show(summary, directory)
    return summary


@dataclass(frozen=True)
class Trained:
    """A training that has ended, with the exact figures on its way where these are known."""

    settings: Settings
    fit: Fit
    loop: ParticleLoop
    model: EnergyModel
    curve: list[dict[str, Any]]


def train(
    settings: Settings, data: Data, loop: ParticleLoop, directory: RunDirectory | None = None, looks: int = LOOKS
) -> Trained:
    """Train, with followers and watch; on the plane with exact figures along the way.

    Raises:
        DivergenceError: see `Watch`; `directory.model` then holds the last sound model.
    """
    standardised, _ = data.standardised()
    save = None if directory is None else (lambda state: to_model(settings, loop, data).save(directory.model))
    callbacks: list[Any] = [Watch(standardised, save=save), Refresh(settings)]
    curve: list[dict[str, Any]] = []
    if data.law is not None:
        quadrature = Quadrature(data.shift, data.scale, data.law)
        every = max(1, settings.updates // looks)

        def look(state: Fit) -> None:
            if state.updates % every == 0 or state.updates == settings.updates:
                found = quadrature.figures(state.model)
                work = {"updates": state.updates, "seconds": state.seconds} | loop.cost()
                if loop.weighted:
                    found["log_z_particles"] = float(loop.particles.log_z or 0.0)
                curve.append(work | found)
                state.metrics |= {f"exact_{name}": value for name, value in found.items()}

        callbacks.append(look)
    state = fit(loop, settings.updates, callbacks=callbacks, directory=directory, description=settings.arm)
    return Trained(settings, state, loop, to_model(settings, loop, data), curve)


def log_z_by_annealing(model: EnergyModel, noise: Noise, steps: int = ANNEALING[1]) -> tuple[float, float]:
    """Log Z of a potential and its standard error over replicate runs, by annealed importance sampling."""
    kernel = (
        replace(model.moves, sampler="hmc").kernel() if model.moves.sampler == "underdamped" else model.moves.kernel()
    )
    followers = annealed(model.potential.tempered, kernel, ANNEALING[0], noise, steps=steps)
    return followers.log_z(model.potential)


def judge(trained: Trained, data: Data) -> dict[str, Any]:
    """The headline numbers of a training."""
    _, held_out = data.standardised()
    model, loop = trained.model, trained.loop
    estimate, error = log_z_by_annealing(model, Noise(trained.settings.seed).stream(JUDGE))
    summary: dict[str, Any] = {
        "seconds": trained.fit.seconds,
        "updates": trained.fit.updates,
        **loop.cost(),
        "log_z_estimate": estimate,
        "log_z_estimate_se": error,
        "mmd2": MMD(held_out[:2000]).value(Particles(model.particles[:2000])).item(),
    }
    if loop.weighted:
        held = loop.particles
        assert held.log_z is not None
        summary |= {"log_z_particles": held.log_z.item(), "ess": held.ess.item()}
    known = model.with_log_z(estimate, error)
    if trained.curve:
        exact = {k: v for k, v in trained.curve[-1].items() if k in ("log_z", "nll", "kl", "mode_masses", "mode_error")}
        summary |= exact
        known = model.with_log_z(exact["log_z"], 0.0)
    scores = known.log_density(data.held_out)
    spread = math.hypot(scores.std().item() / math.sqrt(len(scores)), known.log_z_se or 0.0)
    return summary | {"nll_held_out": -scores.mean().item(), "nll_held_out_se": spread}


def show(summary: dict[str, Any], directory: RunDirectory) -> None:
    """Print the headline numbers."""
    if "kl" in summary:
        print(
            f"exact     KL(data‖model) {summary['kl']:.4f} nats, nll {summary['nll']:.4f}, log Z {summary['log_z']:.4f}"
        )
    if "mode_error" in summary:
        print(f"modes     total variation of their masses {summary['mode_error']:.3f}")
    print(f"annealing log Z {summary['log_z_estimate']:.4f} ± {summary['log_z_estimate_se']:.4f}")
    if "log_z_particles" in summary:
        print(
            f"training  log Z {summary['log_z_particles']:.4f} by its weights, {summary['ess']:.0f} of them effective"
        )
    print(f"held out  nll {summary['nll_held_out']:.4f} ± {summary['nll_held_out_se']:.4f} nats")
    for line in summary["advice"]:
        print(f"advice    {line}")
    print(
        f"cost      {summary['seconds']:.0f} s, {summary['updates']} updates, "
        f"{summary['gradient_evaluations']} pulls through V at all particles"
    )
    print(f"run       {directory.path}")
