"""Implicit Diffusion: optimise samplers through the distributions they produce.

    p ← Σ(p, θ)            one step of the sampler on the particles
    θ ← θ − η Γ(p, θ)      one optimizer step on an estimate of ∇F(π*(θ))

After *Implicit Diffusion: Efficient Optimization through Stochastic Sampling* (Marion et al., arXiv 2402.05468).

The names here are what a first program needs. The rest is in the namespaces: `tables`, `denoisers`, `potentials`,
`samplers`, `objectives`, `gradients`, `models`, `evaluation`, `loops`, `runs` and `errors`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion import (
        denoisers,
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
    from implicit_diffusion.commands.finetune.plan import make_plan
    from implicit_diffusion.commands.rewards.names import load_reward
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
    from implicit_diffusion.evaluation import Evaluation
    from implicit_diffusion.evaluation.bounds import Bound, bound, captured
    from implicit_diffusion.evaluation.chains import evaluate
    from implicit_diffusion.gradients import Adjoint, FullBackprop
    from implicit_diffusion.loops import NestedParticles, Unrolled
    from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise
    from implicit_diffusion.loops.memory import predict_memory
    from implicit_diffusion.loops.nested import Nested
    from implicit_diffusion.loops.queue import Queue
    from implicit_diffusion.loops.single import Single
    from implicit_diffusion.loops.update import Update
    from implicit_diffusion.models.pretrained import DiffusersDenoiser, Pretrained, load_pretrained, save_pipeline
    from implicit_diffusion.models.prompts import embed_prompts
    from implicit_diffusion.noise import Noise
    from implicit_diffusion.objectives import DriftPenalty, Functional, Objective, Sinkhorn, gaussian_kernel
    from implicit_diffusion.objectives.kl import ForwardKL, ReverseKL
    from implicit_diffusion.objectives.mmd import MMD
    from implicit_diffusion.objectives.path import PathKL
    from implicit_diffusion.objectives.reward import Reward
    from implicit_diffusion.particles import Particles
    from implicit_diffusion.potentials import Guided, Tilted, conv, mlp
    from implicit_diffusion.potentials.mixture import GaussianMixture
    from implicit_diffusion.runs.fit import fit
    from implicit_diffusion.samplers import Underdamped, power_law, warm_up
    from implicit_diffusion.samplers.chain import Chain
    from implicit_diffusion.samplers.followers import Followers, annealed
    from implicit_diffusion.samplers.hmc import HMC
    from implicit_diffusion.samplers.langevin import MALA, ULA
    from implicit_diffusion.tables.flow import memoryless_flow
    from implicit_diffusion.tables.named import default_sampler, scheduler_for, table_for
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
    "captured",
    "checkpoint_activations",
    "conv",
    "default_sampler",
    "denoisers",
    "embed_prompts",
    "errors",
    "ess_in_time",
    "evaluate",
    "evaluation",
    "fit",
    "gaussian_kernel",
    "gradients",
    "load_pretrained",
    "load_reward",
    "loops",
    "make_plan",
    "memoryless_flow",
    "merged",
    "mlp",
    "models",
    "objectives",
    "ou_probability_flow",
    "ou_reverse_sde",
    "potentials",
    "power_law",
    "predict_memory",
    "r_hat",
    "read_table",
    "runs",
    "samplers",
    "save_pipeline",
    "scheduler_for",
    "signal_to_noise",
    "table_for",
    "tables",
    "warm_up",
]
__version__ = "0.1.0"
