"""Loops: state in, one update, metrics out."""

from implicit_diffusion.loops.evaluation import Evaluation, evaluate
from implicit_diffusion.loops.nested import Nested
from implicit_diffusion.loops.queue import Queue
from implicit_diffusion.loops.update import Update

__all__ = ["Evaluation", "Nested", "Queue", "Update", "evaluate"]
