"""The families of diffusers pipelines that can be fine-tuned, and how they differ.

    family        network                  sampled under     samples
    pixels        UNet2DModel              nothing, classes  images
    DiT           DiTTransformer2DModel    classes           latents
    SD            UNet2DConditionModel     prompts           latents
    SD3           SD3Transformer2DModel    prompts           latents

A new family of the same kind needs one more row here: every network goes through one adapter (`DiffusersDenoiser`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PipelineFamily:
    """One row of the table.

    Args:
        pipelines: names of its pipelines in diffusers; empty where the parts alone decide.
        part: the network's part of the pipeline, which is also its folder.
        network: name of its class in diffusers.
        condition: what it is sampled under; for pixel networks their config says whether they are class-conditional.
        needs: parts that a pipeline of the family must have.
        guidance: the scale w that its pipeline uses by default.
        embeddings: arguments of the network that text encoders fill.
        passes_eta: whether its pipeline has an argument for the noise η of DDIM; the others run DDIM without noise.
        may_have: parts that its pipeline may have as well.
        options: those of its pipeline in model_index.json.
        shifted: whether its pipeline decodes D(z/σ + μ), with the autoencoder's shift_factor μ; the others decode
            D(z/σ) and ignore that factor.
    """

    pipelines: tuple[str, ...]
    part: str
    network: str
    condition: Literal["classes", "prompts"] | None
    needs: tuple[str, ...] = ()
    guidance: float = 1.0
    embeddings: tuple[str, ...] = ()
    passes_eta: bool = False
    may_have: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    shifted: bool = False

    @property
    def parts(self) -> frozenset[str]:
        """All parts that its pipeline can have."""
        return frozenset({self.part, "scheduler", *self.needs, *self.may_have})

    @property
    def latent(self) -> bool:
        """Whether samples are latents, which a decoder turns into images."""
        return "vae" in self.needs

    @property
    def convolutional(self) -> bool:
        """Whether the channels-last memory format makes the network faster."""
        return self.network.startswith("UNet")


PIXELS = PipelineFamily((), "unet", "UNet2DModel", None, passes_eta=True)
DIT = PipelineFamily(
    ("DiTPipeline",),
    "transformer",
    "DiTTransformer2DModel",
    "classes",
    needs=("vae",),
    guidance=4.0,
    options=("id2label",),
)
SD = PipelineFamily(
    ("StableDiffusionPipeline",),
    "unet",
    "UNet2DConditionModel",
    "prompts",
    needs=("vae",),
    guidance=7.5,
    embeddings=("encoder_hidden_states",),
    passes_eta=True,
    may_have=("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"),
    options=("requires_safety_checker",),
)
SD3 = PipelineFamily(
    ("StableDiffusion3Pipeline",),
    "transformer",
    "SD3Transformer2DModel",
    "prompts",
    needs=("vae",),
    guidance=7.0,
    embeddings=("encoder_hidden_states", "pooled_projections"),
    may_have=(
        *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
        "image_encoder",
        "feature_extractor",
    ),
    shifted=True,
)
FAMILIES = (PIXELS, DIT, SD, SD3)


WIDTHS = {
    "encoder_hidden_states": ("encoder_hid_dim", "joint_attention_dim", "cross_attention_dim"),
    "pooled_projections": ("pooled_projection_dim",),
}  # of embeddings: keys of a network's config; the first one that is there holds their width


def family_of(pipeline: str, parts: dict[str, tuple[str, str]]) -> PipelineFamily | None:
    """The family of a pipeline class with these parts, name → (library, class); None where no family has them."""
    for family in FAMILIES:
        if parts.get(family.part) != ("diffusers", family.network):
            continue
        named = pipeline in family.pipelines if family.pipelines else set(parts) == {family.part, "scheduler"}
        if named and set(family.needs) | {"scheduler"} <= set(parts):
            return family
    return None
