"""Objectives F: functionals of the distribution that a sampler produces, always minimised."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.objectives.base import GibbsObjective, Objective, RunningCost, Sum, Term, TerminalObjective
    from implicit_diffusion.objectives.evidence import Evidence
    from implicit_diffusion.objectives.functional import Functional
    from implicit_diffusion.objectives.kl import ForwardKL, ReverseKL
    from implicit_diffusion.objectives.mmd import MMD, gaussian_kernel
    from implicit_diffusion.objectives.path import DriftPenalty, PathKL
    from implicit_diffusion.objectives.reward import Reward
    from implicit_diffusion.objectives.sinkhorn import Sinkhorn
    from implicit_diffusion.objectives.variation import Density, FirstVariation
    from implicit_diffusion.objectives.weighted_rewards import WeightedRewards
    from implicit_diffusion.scorers.scorer import Scorer
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "MMD",
    "Density",
    "DriftPenalty",
    "Evidence",
    "FirstVariation",
    "ForwardKL",
    "Functional",
    "GibbsObjective",
    "Objective",
    "PathKL",
    "ReverseKL",
    "Reward",
    "RunningCost",
    "Scorer",
    "Sinkhorn",
    "Sum",
    "Term",
    "TerminalObjective",
    "WeightedRewards",
    "gaussian_kernel",
]
