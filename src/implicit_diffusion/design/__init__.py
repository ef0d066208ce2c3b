"""Design of experiments: where to measure, so that the outcome says most about what is not known."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.design.bounds import Gain, contrastive_bounds, information_gain
    from implicit_diffusion.design.experiment import Experiment, GaussianExperiment, Pairs
    from implicit_diffusion.design.gain import InformationGain, PooledInformationGain, lag
    from implicit_diffusion.design.pool import Pool
    from implicit_diffusion.design.posterior import PosteriorKernel
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "Experiment",
    "Gain",
    "GaussianExperiment",
    "InformationGain",
    "Pairs",
    "Pool",
    "PooledInformationGain",
    "PosteriorKernel",
    "contrastive_bounds",
    "information_gain",
    "lag",
]
