"""What every objective owes, in one suite that the tests of each objective inherit."""

from __future__ import annotations

from implicit_diffusion.objectives import TerminalObjective
from implicit_diffusion.particles import Particles


def check(term: TerminalObjective, particles: Particles) -> None:
    """What an estimator that follows the objective's gradient demands of it."""
    term.check_value(particles)
    term.check_slope(particles)
