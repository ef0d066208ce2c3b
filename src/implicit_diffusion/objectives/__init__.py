"""Objectives F: functionals of the distribution that a sampler produces, always minimised."""

from implicit_diffusion.objectives.base import Objective, RunningCost, TerminalObjective
from implicit_diffusion.objectives.path import DriftPenalty, PathKL
from implicit_diffusion.objectives.reward import Reward

__all__ = ["DriftPenalty", "Objective", "PathKL", "Reward", "RunningCost", "TerminalObjective"]
