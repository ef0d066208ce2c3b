"""Implicit Diffusion: optimise samplers through the distributions they produce.

    p ← Σ(p, θ)            one step of the sampler on the particles
    θ ← θ − η Γ(p, θ)      one optimizer step on an estimate of ∇F(π*(θ))

After *Implicit Diffusion: Efficient Optimization through Stochastic Sampling* (Marion et al., arXiv 2402.05468).

The names here are what a first program needs. The rest is in the namespaces: `tables`, `denoisers`, `potentials`,
`samplers`, `objectives`, `gradients`, `models`, `evaluation`, `design`, `loops`, `runs` and `errors`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion import (
        denoisers,
        design,
        errors,
        evaluation,
        gradients,
        loops,
        models,
        objectives,
        potentials,
        runs,
        samplers,
        tables,
    )
    from implicit_diffusion.commands.rewards.names import load_reward
    from implicit_diffusion.evaluation.chains import evaluate
    from implicit_diffusion.evaluation.gains import captured
    from implicit_diffusion.evaluation.plans import make_plan
    from implicit_diffusion.loops.nested import Nested
    from implicit_diffusion.loops.queue import Queue
    from implicit_diffusion.loops.single import Single
    from implicit_diffusion.loops.update import Update
    from implicit_diffusion.models.own_models.diffusion_model import DiffusionModel
    from implicit_diffusion.models.pipelines.loading import load_pipeline
    from implicit_diffusion.models.pipelines.reading import read_pipeline
    from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
    from implicit_diffusion.noise import Noise
    from implicit_diffusion.objectives.kl import ForwardKL, ReverseKL
    from implicit_diffusion.objectives.mmd import MMD
    from implicit_diffusion.objectives.path import PathKL
    from implicit_diffusion.objectives.reward import Reward
    from implicit_diffusion.particles import Particles
    from implicit_diffusion.potentials.mixture import GaussianMixture
    from implicit_diffusion.runs.fit import fit
    from implicit_diffusion.samplers.chain import Chain
    from implicit_diffusion.samplers.hmc import HMC
    from implicit_diffusion.samplers.langevin import MALA, ULA
    from implicit_diffusion.tables.scheduler import read_table
    from implicit_diffusion.tables.table import ChainTable
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "HMC",
    "MALA",
    "MMD",
    "ULA",
    "Chain",
    "ChainTable",
    "DiffusionModel",
    "ForwardKL",
    "GaussianMixture",
    "Nested",
    "Noise",
    "Particles",
    "PathKL",
    "Queue",
    "ReverseKL",
    "Reward",
    "Single",
    "Update",
    "captured",
    "denoisers",
    "design",
    "errors",
    "evaluate",
    "evaluation",
    "fit",
    "gradients",
    "load_pipeline",
    "load_pretrained",
    "load_reward",
    "loops",
    "make_plan",
    "models",
    "objectives",
    "potentials",
    "read_pipeline",
    "read_table",
    "runs",
    "samplers",
    "save_pipeline",
    "tables",
]
__version__ = "0.1.0"
