"""Train an energy-based model by maximum likelihood in a single loop; on the plane, say exactly how good it is.

    load → build V = Gaussian + network → weighted particles and a watch → log Z by annealing → save → figures

minimising KL(p_ref‖π_θ). `--compare` runs all arms at equal cost, with their learning rates searched on a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from implicit_diffusion.errors import DivergenceError, InvalidInputError
from implicit_diffusion.experiments.ebm_arms import Refresh, Settings, Watch, make_loop, to_model
from implicit_diffusion.experiments.ebm_data import Data, load
from implicit_diffusion.experiments.energy_model import Architecture, EnergyModel, Moves
from implicit_diffusion.experiments.planar import Quadrature
from implicit_diffusion.experiments.ranges import at_least, not_negative, positive
from implicit_diffusion.loops.diagnostics import advice
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.directory import dated
from implicit_diffusion.runs.fit import Fit, fit
from implicit_diffusion.samplers.followers import annealed

LOOKS = 12  # exact figures on the way
DEFAULTS: dict[str, dict[str, Any]] = {
    "vectors": {
        "potential": "mlp",
        "steps": 1000,
        "particles": 1000,
        "step_size": 0.06,
        "refresh": 250,
        "lr": 3e-3,
        "weight_decay": 0.0,
        "width": 64,
    },
    "images": {
        "potential": "conv",
        "steps": 1200,
        "particles": 256,
        "step_size": 0.2,
        "refresh": 100,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "width": 16,
    },
}
ANNEALING = 1600, 200  # particles and steps
ANNEALING_IMAGES = 400, 1500  # their weights are heavier: few steps find log Z too low
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
    """Updates of θ; 1000 for vectors, 1200 for images by default."""
    particles: int | None = None
    """n, and data per update; 1000 for vectors, 256 for images by default."""
    step_size: float | None = None
    """h in standardised coordinates: for hmc and underdamped 0.06 for vectors, 0.2 for images by default; the square of
    that for ula and mala."""
    leapfrogs: int = 4
    """Of hmc. Together with the step size they should carry a particle through its mode."""
    refresh: int | None = None
    """Updates after which weighted particles are drawn anew by annealing, which ends the errors that their weights
    have accumulated; 0 for never; 250 for vectors, 100 for images by default."""
    lr: float | None = None
    """Of Adam at the start, with cosine decay to zero; 3e-3 for vectors, 1e-3 for images by default."""
    weight_decay: float | None = None
    """Of AdamW; holds a network down that out-grows the Gaussian. 0 for vectors, 0.01 for images by default."""
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
        at_least(self, steps=1, particles=16, leapfrogs=1, width=1, seeds=1, seed=0, refresh=0)
        if self.weighted and self.particles is not None and self.particles % 8:
            raise InvalidInputError(f"--particles must be a multiple of 8, got {self.particles}")
        positive(self, "step_size", "lr")
        not_negative(self, "weight_decay")

    def resolved(self, data: Data) -> Config:
        """With the defaults for these data in place of None."""
        defaults = DEFAULTS["images" if len(data.event_shape) == 3 else "vectors"]
        if self.sampler in ("ula", "mala"):
            defaults = defaults | {"step_size": defaults["step_size"] ** 2}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def settings(self, data: Data) -> Settings:
        """What to train on these data."""
        known: Any = self.resolved(data)
        return Settings(
            Architecture(known.potential, data.event_shape, known.width),
            Moves(self.sampler, known.step_size, self.leapfrogs),
            "weighted" if self.weighted else "hmc",
            known.particles,
            known.steps,
            known.lr,
            self.seed,
            weight_decay=known.weight_decay,
            refresh=known.refresh if self.weighted else 0,
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
    out = config.out or dated(f"ebm-{Path(config.data).stem}")
    if directory is None:
        RunDirectory.check(out)
    data = load(config.data, Noise(config.seed))
    settings = config.settings(data)
    loop = make_loop(settings, data)
    directory = directory or RunDirectory.create(out)
    directory.write_config(replace(config.resolved(data), out=out))
    trained = train(settings, data, loop, directory, LOOKS)
    if trained.fit.stopped == "interrupted":
        raise KeyboardInterrupt(f"interrupted; go on with `implicit-diffusion resume {directory.path}`")
    summary = judge(trained, data) | {"advice": advice(loop, trained.fit.metrics)}
    model = trained.model.with_log_z(summary["log_z_estimate"], summary["log_z_estimate_se"])
    if "log_z" in summary:
        model = model.with_log_z(summary["log_z"], 0.0)
    model.save(directory.model)
    if config.data == "digits":
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


def train(settings: Settings, data: Data, loop: ParticleLoop, directory: RunDirectory | None, looks: int) -> Trained:
    """Train under a watch; on the plane with exact figures along the way.

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
    if directory is not None and not directory.model.exists():  # a resumed run has a later one
        to_model(settings, loop, data).save(directory.model)  # sound, if nothing later is
    try:
        state = fit(loop, settings.updates, callbacks=callbacks, directory=directory, description=settings.arm)
    except DivergenceError as error:
        kept = f"; the last sound model is in {directory.model}" if directory is not None else ""
        raise DivergenceError(f"{error}{kept}") from error
    if data.law is not None and not curve:  # resumed after its last update
        look(state)
    return Trained(settings, state, loop, to_model(settings, loop, data), curve)


def log_z_by_annealing(model: EnergyModel, noise: Noise) -> tuple[float, float]:
    """Log Z of a potential and its standard error over replicate runs, by annealed importance sampling."""
    moves, images = model.moves, len(model.architecture.event_shape) == 3
    n, steps = ANNEALING_IMAGES if images else ANNEALING
    if moves.sampler != "hmc":  # which cannot explode
        moves = Moves("hmc", DEFAULTS["images" if images else "vectors"]["step_size"])
    followers = annealed(model.potential.tempered, moves.kernel(), n, noise, steps=steps)
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
