"""Denoisers u(x, t; θ)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
    from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
    from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
    from implicit_diffusion.denoisers.lora import WithoutAdapter, add_lora, checkpoint_activations, merged
    from implicit_diffusion.denoisers.sharded import shard, whole_copy
    from implicit_diffusion.frozen import eval_mode, frozen_copy
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "ClassifierFree",
    "DiffusersDenoiser",
    "Drawn",
    "Embedded",
    "GaussianDenoiser",
    "WithoutAdapter",
    "add_lora",
    "checkpoint_activations",
    "eval_mode",
    "frozen_copy",
    "merged",
    "shard",
    "whole_copy",
]
