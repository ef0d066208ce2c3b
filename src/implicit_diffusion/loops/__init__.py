"""Loops: state in, one update of θ, metrics out; and what their metrics say."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.loops.baselines import NestedParticles, Unrolled
    from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise, statistics
    from implicit_diffusion.loops.diagnostics.divergence import distance
    from implicit_diffusion.loops.memory import predict_memory
    from implicit_diffusion.loops.nested import Nested
    from implicit_diffusion.loops.queue import Queue
    from implicit_diffusion.loops.single import Single
    from implicit_diffusion.loops.starts.score_matching import ScoreMatching
    from implicit_diffusion.loops.timetable import Timetable
    from implicit_diffusion.loops.update import Update
    from implicit_diffusion.loops.vectorized.loop import Vectorized
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Nested",
    "NestedParticles",
    "Queue",
    "ScoreMatching",
    "Single",
    "Timetable",
    "Unrolled",
    "Update",
    "Vectorized",
    "advice",
    "distance",
    "ess_in_time",
    "predict_memory",
    "r_hat",
    "signal_to_noise",
    "statistics",
]
