"""A start by score matching, which needs no particles, and the particles that take over from it.

    V = Gaussian + network of zeros → score matching → particles of V by annealing, weighted, with log Z → the loop

The start is a run of its own in the folder start/ of the run, with metrics and checkpoints: an interrupted run
continues within it. The run itself is then at update 0; what the start was belongs to its later states.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.ebm.arms import SCORES, Settings, redrawn
from implicit_diffusion.commands.ebm.summary import Started
from implicit_diffusion.loops import ScoreMatching, Update
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.fit import Fit, fit
from implicit_diffusion.showing import Shown

FOLDER = "start"  # in that of the run


@dataclass(repr=False)
class StartByScores(Shown):
    """Callback: before the first update, the potential learns the scores of the data, and particles are drawn anew.

    Args:
        settings: of the training; `settings.start` is what is done here.
        data: of the training, standardised.
        keep: number of checkpoints that stay.

    Attributes:
        started: what the start was, once it is over.
    """

    settings: Settings
    data: Tensor
    keep: int
    started: Started | None = field(default=None, init=False)

    def begin(self, fit: Fit) -> None:
        """Make the start, or what an interruption has left of it.

        Raises:
            KeyboardInterrupt: a signal came meanwhile; the next call continues.
            NonFiniteError: NaN or infinity, before θ was touched.
        """
        if self.started is None and not fit.updates:
            assert isinstance(fit.loop, ParticleLoop)
            self.started = self._make(fit.loop, fit.directory)
            fit.seconds += self.started.seconds

    def __call__(self, fit: Fit) -> None:
        """Nothing: all is done before the first update."""

    def state_dict(self) -> dict[str, Any]:
        return {} if self.started is None else asdict(self.started)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = Started(**state) if state else None

    def _make(self, loop: ParticleLoop, directory: RunDirectory | None) -> Started:
        settings, start = self.settings, self.settings.start
        assert start is not None
        adam = torch.optim.AdamW(
            loop.model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        scores = ScoreMatching(
            loop.model,
            self.data,
            Update(adam, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(adam, start.updates)),
            noise_std=start.noise_std,
            noise=Noise(settings.seed).stream(SCORES),
            batch=settings.particles,
        )
        own = None if directory is None else RunDirectory(directory.path / FOLDER)
        done = fit(scores, start.updates, directory=own, keep=self.keep, description="score matching")
        if done.stopped == "interrupted":
            raise KeyboardInterrupt
        began = time.monotonic()
        with part("training"):
            replicas = redrawn(settings, loop, 0)
            log_z, log_z_se = replicas.log_z(loop.model)
            particles = replicas.particles(loop.model)
        work = scores.cost()["gradient_evaluations"] + replicas.gradient_evaluations
        loop.refresh(particles, gradient_evaluations=work)
        return Started(
            updates=done.updates,
            seconds=done.seconds + time.monotonic() - began,
            gradient_evaluations=work,
            score_matching=float(done.metrics["score_matching"]),
            log_z=log_z,
            log_z_se=log_z_se,
            ess=particles.ess.item(),
        )
