"""Gradient estimators Γ of θ ↦ F(π*(θ))."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.gradients.adjoint import Adjoint, pull_back, terminal_adjoint
    from implicit_diffusion.gradients.adjoint_matching import AdjointMatching
    from implicit_diffusion.gradients.adjoint_measure import AdjointMeasure, AdjointSolver
    from implicit_diffusion.gradients.backprop import FullBackprop
    from implicit_diffusion.gradients.conjugate_gradients import ConjugateGradients
    from implicit_diffusion.gradients.estimator import Estimator, Pulled, RowEstimator, RowStates, TrajectoryResult
    from implicit_diffusion.gradients.footprint import (
        Footprint,
        bytes_of,
        end_activations,
        row_activations,
        variation_activations,
    )
    from implicit_diffusion.gradients.fused import Fused, fused_pass
    from implicit_diffusion.gradients.gibbs import Gibbs
    from implicit_diffusion.gradients.score_function import ScoreFunction
    from implicit_diffusion.gradients.surrogate import Surrogate
    from implicit_diffusion.gradients.truncated import TruncatedBackprop
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Adjoint",
    "AdjointMatching",
    "AdjointMeasure",
    "AdjointSolver",
    "ConjugateGradients",
    "Estimator",
    "Footprint",
    "FullBackprop",
    "Fused",
    "Gibbs",
    "Pulled",
    "RowEstimator",
    "RowStates",
    "ScoreFunction",
    "Surrogate",
    "TrajectoryResult",
    "TruncatedBackprop",
    "bytes_of",
    "end_activations",
    "fused_pass",
    "pull_back",
    "row_activations",
    "terminal_adjoint",
    "variation_activations",
]
