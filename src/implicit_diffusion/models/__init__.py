"""Models from disk and back: diffusers pipelines, prompts, energy-based models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.models.pretrained import DiffusersDenoiser, Pretrained, load_pretrained, save_pipeline
    from implicit_diffusion.models.prompts import embed_prompts
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["DiffusersDenoiser", "Pretrained", "embed_prompts", "load_pretrained", "save_pipeline"]
