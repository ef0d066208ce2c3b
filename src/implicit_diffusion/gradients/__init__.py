"""Gradient estimators Γ of θ ↦ F(π*(θ))."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.gradients.adjoint import Adjoint, pull_back, terminal_adjoint
    from implicit_diffusion.gradients.adjoint_measure import AdjointMeasure, AdjointSolver
    from implicit_diffusion.gradients.backprop import FullBackprop
    from implicit_diffusion.gradients.fused import Fused, fused_pass
    from implicit_diffusion.gradients.gibbs import Gibbs
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Adjoint",
    "AdjointMeasure",
    "AdjointSolver",
    "FullBackprop",
    "Fused",
    "Gibbs",
    "fused_pass",
    "pull_back",
    "terminal_adjoint",
]
