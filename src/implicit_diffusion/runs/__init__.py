"""F5: what a run leaves on disk and shows on screen, and how it is stopped and continued."""

from implicit_diffusion.runs.checkpoint import load_state, save_state
from implicit_diffusion.runs.console import Progress, progress
from implicit_diffusion.runs.directory import RunDirectory
from implicit_diffusion.runs.signals import Stop, graceful

__all__ = ["Progress", "RunDirectory", "Stop", "graceful", "load_state", "progress", "save_state"]
