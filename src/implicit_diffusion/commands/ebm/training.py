"""One training of an energy-based model, in any arm, under a watch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.ebm.arms import Refresh, Settings, to_model
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.shared.planar import Quadrature
from implicit_diffusion.commands.shared.ranges import WORDS
from implicit_diffusion.errors import DivergenceError, NonFiniteError
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.loops.particle import ParticleLoop
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.adapt import AdaptStep
from implicit_diffusion.runs.callbacks.watch import Watch
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.fit import Fit, fit
from implicit_diffusion.showing import Shown


@dataclass(frozen=True, repr=False)
class Trained(Shown):
    """A training that has ended, with the exact figures on its way where these are known."""

    settings: Settings
    fit: Fit
    loop: ParticleLoop
    model: EnergyModel
    curve: list[dict[str, Any]]


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
            data, energy = loop.model(self.data).double(), loop.model(loop.walkers.x).double()
        held = loop.particles
        mean = (held.weights * energy).sum()
        variance = (held.weights * (energy - mean).square()).sum() / held.ess + data.var() / len(data)
        if mean.isfinite() and variance.isfinite():
            fit.metrics |= {"energy_gap": (data.mean() - mean).item(), "energy_gap_se": variance.sqrt().item()}


def train(settings: Settings, data: Data, loop: ParticleLoop, directory: RunDirectory | None, looks: int) -> Trained:
    """Train under a watch; on the plane with exact figures along the way.

    Raises:
        DivergenceError: see `Watch`, which has the last word; `directory.model` then holds the last sound model.
        NonFiniteError: NaN or infinity; likewise.
    """
    standardised, _ = data.standardised()
    save = None if directory is None else (lambda state: to_model(settings, loop, data).save(directory.model))
    watch = Watch(standardised, save=save, words=WORDS)
    callbacks: list[Any] = [*[AdaptStep()] * settings.adapt, watch, Refresh(settings), Gap(standardised[:1000])]
    curve: list[dict[str, Any]] = []
    if data.law is not None:
        quadrature = Quadrature(data.shift, data.scale, data.law)
        every = max(1, settings.updates // looks)

        def look(state: Fit) -> None:
            if state.updates % every == 0 or state.updates == settings.updates:
                with part("held-out checks"):
                    figures = quadrature.figures(state.model)
                work = {"updates": state.updates, "seconds": state.seconds} | loop.cost()
                if loop.weighted:
                    figures["log_z_particles"] = float(loop.particles.log_z or 0.0)
                curve.append(work | figures)
                state.metrics |= {f"exact_{name}": value for name, value in figures.items()}

        callbacks.append(look)
    if directory is not None and not directory.model.exists():  # a resumed run has a later one
        to_model(settings, loop, data).save(directory.model)  # sound, if nothing later is
    try:
        state = fit(loop, settings.updates, callbacks=callbacks, directory=directory, description=settings.description)
        if state.updates == settings.updates:
            watch.look(state)
    except (DivergenceError, NonFiniteError) as error:
        change = ". Take a smaller --lr or --step-size, or add --weight-decay" if type(error) is NonFiniteError else ""
        kept = f"; the last sound model is in {directory.model}" if directory is not None else ""
        raise type(error)(f"{error}{change}{kept}") from error
    if data.law is not None and not curve:  # resumed after its last update
        look(state)
    return Trained(settings, state, loop, to_model(settings, loop, data), curve)
