"""Samplers Σ: what turns parameters θ into particles."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.samplers.chain import Chain
    from implicit_diffusion.samplers.followers import Followers, annealed
    from implicit_diffusion.samplers.hmc import HMC
    from implicit_diffusion.samplers.kernel import Kernel, Move, power_law
    from implicit_diffusion.samplers.langevin import MALA, ULA, alpha
    from implicit_diffusion.samplers.resampling import systematic
    from implicit_diffusion.samplers.underdamped import Underdamped
    from implicit_diffusion.samplers.warmup import warm_up
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "HMC",
    "MALA",
    "ULA",
    "Chain",
    "Followers",
    "Kernel",
    "Move",
    "Underdamped",
    "alpha",
    "annealed",
    "power_law",
    "systematic",
    "warm_up",
]
