"""The diffusers pipelines that can be fine-tuned, and what sets them apart.

    family        network                  sampled under     samples
    pixels        UNet2DModel              nothing, classes  images
    DiT           DiTTransformer2DModel    classes           latents
    SD            UNet2DConditionModel     prompts           latents
    SD3           SD3Transformer2DModel    prompts           latents

A row is all that a new family of the same kind needs: every network goes through one adapter (`DiffusersDenoiser`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        pipelines: names of its pipelines in diffusers; empty where the parts alone decide.
        part: the network's part of the pipeline, which is also its folder.
        network: name of its class in diffusers.
        condition: what it is sampled under; class-conditional pixel networks are told by their config.
        needs: parts without which it is no pipeline.
        guidance: the scale w that its pipeline uses by default.
        embeddings: arguments of the network that text encoders fill.
        passes_eta: whether its pipeline can be told the noise of DDIM; the others run it without.
    """

    pipelines: tuple[str, ...]
    part: str
    network: str
    condition: Literal["classes", "prompts"] | None
    needs: tuple[str, ...] = ()
    guidance: float = 1.0
    embeddings: tuple[str, ...] = ()
    passes_eta: bool = False

    @property
    def latent(self) -> bool:
        """Whether samples are latents, which a decoder turns into images."""
        return "vae" in self.needs

    @property
    def convolutional(self) -> bool:
        """Whether the channels-last memory format pays."""
        return self.network.startswith("UNet")


PIXELS = Family((), "unet", "UNet2DModel", None, passes_eta=True)
DIT = Family(("DiTPipeline",), "transformer", "DiTTransformer2DModel", "classes", needs=("vae",), guidance=4.0)
SD = Family(
    ("StableDiffusionPipeline",),
    "unet",
    "UNet2DConditionModel",
    "prompts",
    needs=("vae",),
    guidance=7.5,
    embeddings=("encoder_hidden_states",),
    passes_eta=True,
)
SD3 = Family(
    ("StableDiffusion3Pipeline",),
    "transformer",
    "SD3Transformer2DModel",
    "prompts",
    needs=("vae",),
    guidance=7.0,
    embeddings=("encoder_hidden_states", "pooled_projections"),
)
FAMILIES = (PIXELS, DIT, SD, SD3)


def family_of(pipeline: str, parts: dict[str, tuple[str, str]]) -> Family | None:
    """The family of a pipeline class with these parts, name → (library, class); None where it is none of them."""
    for family in FAMILIES:
        if parts.get(family.part) != ("diffusers", family.network):
            continue
        named = pipeline in family.pipelines if family.pipelines else set(parts) == {family.part, "scheduler"}
        if named and set(family.needs) | {"scheduler"} <= set(parts):
            return family
    return None
