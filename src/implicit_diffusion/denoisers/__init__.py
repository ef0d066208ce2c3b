"""Denoisers u(x, t; θ) and the tables that make samplers of them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
    from implicit_diffusion.denoisers.flow import memoryless_flow
    from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
    from implicit_diffusion.denoisers.kinds import KINDS, default_kind, pipeline_for, scheduler_for, table_for
    from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations, merged
    from implicit_diffusion.denoisers.ornstein_uhlenbeck import ou_probability_flow, ou_reverse_sde
    from implicit_diffusion.denoisers.pretrained import (
        DiffusersDenoiser,
        Pretrained,
        load_pretrained,
        save_pipeline,
    )
    from implicit_diffusion.denoisers.scheduler import read_table
    from implicit_diffusion.denoisers.table import ChainTable
    from implicit_diffusion.denoisers.text import embed_prompts
    from implicit_diffusion.frozen import eval_mode, frozen_copy
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "KINDS",
    "ChainTable",
    "ClassifierFree",
    "DiffusersDenoiser",
    "Drawn",
    "Embedded",
    "GaussianDenoiser",
    "Pretrained",
    "WithoutAdapter",
    "add_lora",
    "checkpoint_activations",
    "default_kind",
    "embed_prompts",
    "eval_mode",
    "frozen_copy",
    "load_pretrained",
    "memoryless_flow",
    "merged",
    "ou_probability_flow",
    "ou_reverse_sde",
    "pipeline_for",
    "read_table",
    "save_pipeline",
    "scheduler_for",
    "table_for",
]
