"""Implicit Diffusion: optimise samplers through the distributions they produce.

    p ← Σ(p, θ)            one step of the sampler on the particles
    θ ← θ − η Γ(p, θ)      one optimizer step on an estimate of ∇F(π*(θ))

After *Implicit Diffusion: Efficient Optimization through Stochastic Sampling* (Marion et al., arXiv 2402.05468).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
    from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
    from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations, merged
    from implicit_diffusion.errors import (
        DivergenceError,
        ImplicitDiffusionError,
        InvalidInputError,
        MemoryLimitError,
        NonAffineError,
        NonFiniteError,
    )
    from implicit_diffusion.evaluation import Evaluation, evaluate
    from implicit_diffusion.evaluation.bounds import Bound, bound
    from implicit_diffusion.gradients import Adjoint, FullBackprop
    from implicit_diffusion.loops import Nested, NestedParticles, Queue, Single, Unrolled, Update
    from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise
    from implicit_diffusion.loops.memory import predict_memory
    from implicit_diffusion.models.pretrained import DiffusersDenoiser, Pretrained, load_pretrained, save_pipeline
    from implicit_diffusion.models.prompts import embed_prompts
    from implicit_diffusion.noise import Noise
    from implicit_diffusion.objectives import (
        MMD,
        DriftPenalty,
        ForwardKL,
        Functional,
        Objective,
        PathKL,
        ReverseKL,
        Reward,
        Sinkhorn,
        gaussian_kernel,
    )
    from implicit_diffusion.particles import Particles
    from implicit_diffusion.potentials import GaussianMixture, Guided, Tilted, conv, mlp
    from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped, power_law, warm_up
    from implicit_diffusion.samplers.chain import Chain
    from implicit_diffusion.samplers.followers import Followers, annealed
    from implicit_diffusion.tables.flow import memoryless_flow
    from implicit_diffusion.tables.named import default_kind, scheduler_for, table_for
    from implicit_diffusion.tables.ornstein_uhlenbeck import ou_probability_flow, ou_reverse_sde
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
    "Adjoint",
    "Bound",
    "Chain",
    "ChainTable",
    "ClassifierFree",
    "DiffusersDenoiser",
    "DivergenceError",
    "Drawn",
    "DriftPenalty",
    "Embedded",
    "Evaluation",
    "Followers",
    "ForwardKL",
    "FullBackprop",
    "Functional",
    "GaussianDenoiser",
    "GaussianMixture",
    "Guided",
    "ImplicitDiffusionError",
    "InvalidInputError",
    "MemoryLimitError",
    "Nested",
    "NestedParticles",
    "Noise",
    "NonAffineError",
    "NonFiniteError",
    "Objective",
    "Particles",
    "PathKL",
    "Pretrained",
    "Queue",
    "ReverseKL",
    "Reward",
    "Single",
    "Sinkhorn",
    "Tilted",
    "Underdamped",
    "Unrolled",
    "Update",
    "WithoutAdapter",
    "add_lora",
    "advice",
    "annealed",
    "bound",
    "checkpoint_activations",
    "conv",
    "default_kind",
    "embed_prompts",
    "ess_in_time",
    "evaluate",
    "gaussian_kernel",
    "load_pretrained",
    "memoryless_flow",
    "merged",
    "mlp",
    "ou_probability_flow",
    "ou_reverse_sde",
    "power_law",
    "predict_memory",
    "r_hat",
    "read_table",
    "save_pipeline",
    "scheduler_for",
    "signal_to_noise",
    "table_for",
    "warm_up",
]
__version__ = "0.1.0"
