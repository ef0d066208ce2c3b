"""Samplers Σ: what turns parameters θ into particles."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.samplers.chain import Chain
    from implicit_diffusion.samplers.hmc import HMC
    from implicit_diffusion.samplers.kernel import Info, Kernel, State, Step, power_law
    from implicit_diffusion.samplers.langevin import MALA, ULA, alpha
    from implicit_diffusion.samplers.metropolis import MetropolisKernel
    from implicit_diffusion.samplers.replicas import Replicas, annealed
    from implicit_diffusion.samplers.simulation import simulate
    from implicit_diffusion.samplers.underdamped import Underdamped
    from implicit_diffusion.samplers.warmup import warm_up
    from implicit_diffusion.samplers.weighted_state import systematic
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
    "Info",
    "Kernel",
    "MetropolisKernel",
    "Replicas",
    "State",
    "Step",
    "Underdamped",
    "alpha",
    "annealed",
    "power_law",
    "simulate",
    "systematic",
    "warm_up",
]
