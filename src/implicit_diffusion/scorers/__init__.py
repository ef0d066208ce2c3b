"""Rewards in a process of their own, computed by the python of another environment."""

from implicit_diffusion.scorers.process import versions
from implicit_diffusion.scorers.scorer import TIMEOUT, Scorer, closing

__all__ = ["TIMEOUT", "Scorer", "closing", "versions"]
