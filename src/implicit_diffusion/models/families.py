"""The families of diffusers pipelines that are known by hand, how they differ, and why probing is not enough for them.

    family   network                  sampled under     samples   known by hand, because
    pixels   UNet2DModel              nothing, classes  images    its pipelines pass no class labels
    DiT      DiTTransformer2DModel    classes           latents   under guidance its pipeline steps a doubled state
    SD       UNet2DConditionModel     prompts           latents   prompts that outgrow the memory, and DDIM with noise
    SD3      SD3Transformer2DModel    prompts           latents   in any pipeline, need no run under all prompts

All networks go through one adapter (`DiffusersDenoiser`). Every other pipeline is of a family that `probed_family`
makes of its class and its parts; its chain is then read off the pipeline (`models.pipelines`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require

TIMES = {"timestep", "timesteps", "timestep_ratio", "t"}  # names of an argument of a network that predicts


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
        probed: whether its chain is read off the pipeline.
        frames: whether its pipeline makes videos, of `num_frames`.
        guided: whether its pipeline has a guidance_scale.
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
    probed: bool = False
    frames: bool = False
    guided: bool = True

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


def probed_family(pipeline: str, parts: dict[str, tuple[str, str]]) -> PipelineFamily | None:
    """A family that is read off by probing, for a pipeline class of diffusers; None where there is no such class.

    Its network is the one part whose forward pass takes a time. Nothing is loaded.

    Raises:
        InvalidInputError: it has no such part, or several; no scheduler; it is sampled under class labels.
    """
    require("diffusers")
    import diffusers

    named: Any = getattr(diffusers, pipeline, None)
    if not (isinstance(named, type) and issubclass(named, diffusers.DiffusionPipeline)):
        return None
    slots = inspect.signature(named).parameters.keys()
    if odd := sorted(parts.keys() - slots):
        raise InvalidInputError(f"a {pipeline} has no part {odd[0]!r}; it has {', '.join(slots)}")
    timed = [
        name
        for name, (library, code) in parts.items()
        if library == "diffusers" and takes_time(getattr(diffusers, code, None))
    ]
    if len(timed) != 1 or "scheduler" not in parts:
        lacks = f"has {' and '.join(timed) or 'none'}" if "scheduler" in parts else "has no scheduler"
        raise InvalidInputError(
            f"a chain has one network that is called with a time, and one scheduler; this {pipeline} {lacks}"
        )
    call = inspect.signature(named.__call__).parameters
    if "class_labels" in call and "prompt" not in call:
        raise InvalidInputError(f"a {pipeline} is sampled under class labels, and of these only DiTPipeline is known")
    scale = call["guidance_scale"].default if "guidance_scale" in call else None
    (network,) = timed
    return PipelineFamily(
        (pipeline,),
        network,
        parts[network][1],
        "prompts" if "prompt" in call else None,
        needs=tuple(part for part in parts if part == "vae"),
        guidance=1.0 if scale is None else float(scale),
        passes_eta="eta" in call,
        may_have=tuple(part for part in parts if part not in (network, "vae", "scheduler")),
        options=tuple(name for name in slots if name not in parts),
        probed=True,
        frames="num_frames" in call,
        guided=scale is not None,
    )


def takes_time(part: Any) -> bool:
    """Whether the forward pass of a class of networks takes a time."""
    forward = getattr(part, "forward", None)
    return forward is not None and bool(inspect.signature(forward).parameters.keys() & TIMES)
