"""Diagnostics of loops over particles: numbers, and plain words on what to change."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.loops.diagnostics.divergence import WORDS, distance, diverged, limit
    from implicit_diffusion.loops.diagnostics.measures import (
        ACCEPTED,
        EFFECTIVE,
        LAG,
        acceptance_advice,
        advice,
        ess_in_time,
        r_hat,
        signal_to_noise,
        statistics,
    )
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "ACCEPTED",
    "EFFECTIVE",
    "LAG",
    "WORDS",
    "acceptance_advice",
    "advice",
    "distance",
    "diverged",
    "ess_in_time",
    "limit",
    "r_hat",
    "signal_to_noise",
    "statistics",
]
