"""Potentials V(x; θ): any module from (n, *event) to (n,), with density π_θ(x) ∝ e^{−V(x; θ)}."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.potentials.energy import Energy, check_potential, energy_of
    from implicit_diffusion.potentials.guided import Guided
    from implicit_diffusion.potentials.inner_problem import InnerProblem, MeanField
    from implicit_diffusion.potentials.mixture import GaussianMixture
    from implicit_diffusion.potentials.normalised import check_normalised
    from implicit_diffusion.potentials.posterior import Posterior
    from implicit_diffusion.potentials.tilted import Tilted, conv, mlp
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Energy",
    "GaussianMixture",
    "Guided",
    "InnerProblem",
    "MeanField",
    "Posterior",
    "Tilted",
    "check_normalised",
    "check_potential",
    "conv",
    "energy_of",
    "mlp",
]
