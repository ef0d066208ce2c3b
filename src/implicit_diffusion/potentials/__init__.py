"""Potentials V(x; θ): any module from (n, *event) to (n,), with density π_θ(x) ∝ e^{−V(x; θ)}."""

from implicit_diffusion.potentials.energy import Energy, check_potential, energy_of
from implicit_diffusion.potentials.guided import Guided
from implicit_diffusion.potentials.mixture import GaussianMixture
from implicit_diffusion.potentials.tilted import Tilted, conv, mlp

__all__ = ["Energy", "GaussianMixture", "Guided", "Tilted", "check_potential", "conv", "energy_of", "mlp"]
