"""Samplers Σ: what turns parameters θ into particles."""

from implicit_diffusion.samplers.hmc import HMC
from implicit_diffusion.samplers.kernel import Kernel, Move, power_law
from implicit_diffusion.samplers.langevin import MALA, ULA
from implicit_diffusion.samplers.resampling import systematic
from implicit_diffusion.samplers.underdamped import Underdamped
from implicit_diffusion.samplers.warmup import warm_up

__all__ = ["HMC", "MALA", "ULA", "Kernel", "Move", "Underdamped", "power_law", "systematic", "warm_up"]
