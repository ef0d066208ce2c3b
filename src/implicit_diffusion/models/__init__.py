"""Models from disk and back: diffusers pipelines, prompts, energy-based models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # read by `lazily`
    from implicit_diffusion.models.adapters.reading import load_adapter
    from implicit_diffusion.models.adapters.saving import save_adapter, save_comfyui_adapter
    from implicit_diffusion.models.energy_model import EnergyModel, load_energy_model
    from implicit_diffusion.models.own_models.diffusion_model import DiffusionModel
    from implicit_diffusion.models.pipelines.cutting import CutPrompt, cut_prompts
    from implicit_diffusion.models.pipelines.loading import load_pipeline
    from implicit_diffusion.models.pipelines.reading import ProbedPipeline, read_pipeline
    from implicit_diffusion.models.pretrained import Pretrained, load_pretrained, save_pipeline
    from implicit_diffusion.models.prompts import embed_prompts
else:

    def __getattr__(name: str) -> object:
        from implicit_diffusion.lazily import attribute

        return attribute(__name__, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "CutPrompt",
    "DiffusionModel",
    "EnergyModel",
    "Pretrained",
    "ProbedPipeline",
    "cut_prompts",
    "embed_prompts",
    "load_adapter",
    "load_energy_model",
    "load_pipeline",
    "load_pretrained",
    "read_pipeline",
    "save_adapter",
    "save_comfyui_adapter",
    "save_pipeline",
]
