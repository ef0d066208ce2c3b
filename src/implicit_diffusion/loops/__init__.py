"""Loops: state in, one update, metrics out."""

from implicit_diffusion.loops.baselines import NestedParticles, Unrolled
from implicit_diffusion.loops.evaluation import Evaluation, evaluate
from implicit_diffusion.loops.nested import Nested
from implicit_diffusion.loops.queue import Queue
from implicit_diffusion.loops.single import Single
from implicit_diffusion.loops.update import Update

__all__ = ["Evaluation", "Nested", "NestedParticles", "Queue", "Single", "Unrolled", "Update", "evaluate"]
