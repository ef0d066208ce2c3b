"""One training of an energy-based model, in any arm, stopped when it diverges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.ebm.arms import Refresh, Settings, to_model
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.ebm.samples import axis_label
from implicit_diffusion.commands.ebm.starts.by_scores import StartByScores
from implicit_diffusion.commands.ebm.summary import CurvePoint, Started
from implicit_diffusion.commands.shared.pictures import PICTURED, image_pixels, plane_pixels
from implicit_diffusion.commands.shared.ranges import WORDS
from implicit_diffusion.commands.shared.summaries import to_json
from implicit_diffusion.errors import DivergenceError, NonFiniteError
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.processes import from_main
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.adapt import AdaptStep
from implicit_diffusion.runs.callbacks.track import Pictures
from implicit_diffusion.runs.callbacks.watch import Watch
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.fit import Fit, fit
from implicit_diffusion.runs.trackers.tracking import Pixels
from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class Trained(Shown):
    """A training that has ended.

    Args:
        settings: what was asked for.
        fit: how far it came.
        loop: at the end.
        model: the result.
        curve: exact figures on the way, where the law of the data is known.
        started: what the start was, where there was one.
    """

    settings: Settings
    fit: Fit
    loop: ParticleLoop
    model: EnergyModel
    curve: list[CurvePoint]
    started: Started | None = None


@dataclass(frozen=True, repr=False)
class Gap(Shown):
    """Callback: by how many nats the mean energy of the data is above that of the particles, for metrics.jsonl.

    The network's share of it is the slope of the likelihood along the network's own scale, which ends at zero.
    """

    data: Tensor
    every: int = 20

    @torch.no_grad()
    def __call__(self, fit: Fit) -> None:
        if fit.updates % self.every:
            return
        loop = fit.loop
        assert isinstance(loop, ParticleLoop)
        with eval_mode(loop.model):
            data, energy = loop.model(self.data).double(), loop.model(loop.weighted_state.x).double()
        weights, ess = loop.particles.weights, loop.particles.ess
        mean = (weights * energy).sum()
        variance = (weights * (energy - mean).square()).sum() / ess + data.var() / len(data)
        if mean.isfinite() and variance.isfinite():
            fit.metrics |= {"energy_gap": (data.mean() - mean).item(), "energy_gap_se": variance.sqrt().item()}


def pictures(data: Data) -> list[Pictures]:
    """The particles in the units of the data, where these are images or points of the plane."""
    shape = tuple(data.event_shape)

    def draw(fit: Fit) -> Pixels:
        loop = fit.loop
        assert isinstance(loop, ParticleLoop)
        particles = loop.particles
        x = particles.x.detach().cpu() * data.scale + data.shift
        if shape == (2,):
            return plane_pixels(x, particles.weights, beside=data.held_out, names=list(map(axis_label, data.names)))
        return image_pixels(x[:PICTURED], data.train.amin().item(), data.train.amax().item())

    return [Pictures(draw, "particles")] if shape == (2,) or len(shape) == 3 else []


def train(
    settings: Settings, data: Data, loop: ParticleLoop, directory: RunDirectory | None, looks: int, keep: int = KEEP
) -> Trained:
    """Train under a watch; with exact figures along the way where the law of the data is known.

    Args:
        settings: what to do.
        data: to train on.
        loop: from `make_loop`.
        directory: of the run, for its model and metrics; None leaves no trace.
        looks: how many exact figures there are, about.
        keep: number of checkpoints that stay.

    Raises:
        DivergenceError: `Watch` finds that the training diverges; `directory.model` then holds the last sound model.
        NonFiniteError: NaN or infinity; likewise.
    """
    standardised, _ = data.standardised()
    save = None if directory is None else (lambda state: to_model(settings, loop, data).save(directory.model))
    watch = Watch(standardised, save=save, words=WORDS)
    callbacks: list[Any] = [*[AdaptStep()] * settings.adapt, watch, Refresh(settings), Gap(standardised[:1000])]
    callbacks[:0] = pictures(data)
    start = None if settings.start is None else StartByScores(settings, standardised, keep)
    if start is not None:
        callbacks.append(start)
    curve: list[CurvePoint] = []
    if data.law is not None:
        quadrature = Quadrature(data.shift, data.scale, data.law)
        every = max(1, settings.updates // looks)

        def look(state: Fit) -> None:
            if state.updates % every == 0 or state.updates == settings.updates:
                with part("held-out checks"):
                    figures = to_json(quadrature.exact_fit(state.model))
                if loop.weighted:
                    figures["log_z_particles"] = float(loop.particles.log_z or 0.0)
                work = loop.cost()["gradient_evaluations"]
                curve.append(
                    CurvePoint(updates=state.updates, seconds=state.seconds, gradient_evaluations=work, **figures)
                )
                state.metrics |= {f"exact_{name}": value for name, value in figures.items()}

        callbacks.append(look)
    if directory is not None and not from_main(directory.model.exists):  # a resumed run has a later one
        to_model(settings, loop, data).save(directory.model)  # sound, if nothing later is
    try:
        state = fit(
            loop,
            settings.updates,
            callbacks=callbacks,
            directory=directory,
            keep=keep,
            description=settings.description,
        )
        if state.updates == settings.updates:
            watch.look(state)
    except (DivergenceError, NonFiniteError) as error:
        change = ". Use a smaller --lr or --step-size, or add --weight-decay" if type(error) is NonFiniteError else ""
        kept = f"; the last sound model is in {directory.model}" if directory is not None else ""
        raise type(error)(f"{error}{change}{kept}") from error
    if data.law is not None and not curve:  # resumed after its last update
        look(state)
    return Trained(
        settings, state, loop, to_model(settings, loop, data), curve, None if start is None else start.started
    )
