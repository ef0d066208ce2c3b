"""Diffusers models: load one as a denoiser, save the result as a pipeline.

load_pretrained("digits")  →  Pretrained(denoiser, scheduler, event_shape)
scheduler_for(scheduler, "ddpm", clip=False)  →  a scheduler that `read_table` can read (`tables.named`)
save_pipeline(folder, denoiser, scheduler, card)  →  a folder that DiffusionPipeline.from_pretrained loads

Text encoders and decoders, which are not trained, are copied from the original folder as regular files: only those that
the pipeline consists of (`pipeline_files`).
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser, unwrapped
from implicit_diffusion.errors import InvalidInputError, check_path, check_type
from implicit_diffusion.extras import require
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.models.checkpoints import INDEX, Checkpoint, find_checkpoint
from implicit_diffusion.models.decoders import Decoder, check_latents
from implicit_diffusion.models.families import PIXELS, WIDTHS, PipelineFamily
from implicit_diffusion.models.parts import load_model, load_network, load_scheduler
from implicit_diffusion.models.pipeline_files import copy_files
from implicit_diffusion.models.pipelines.decoder import PipelineDecoder
from implicit_diffusion.models.prompts import assembled
from implicit_diffusion.processes import main_only
from implicit_diffusion.showing import Shown

# DDPMPipeline calls step(u, t, x) from x_0 ~ N(0, I) with any scheduler; for these it is the right sampler.
RUN_BY_DDPM_PIPELINE = (
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
LARGEST_SAMPLE = 2**28  # numbers
CARD_HEADER = """---
library_name: diffusers
pipeline_tag: {task}
tags:
- diffusers
- implicit-diffusion
---

"""


@dataclass(frozen=True, repr=False)
class Pretrained(Shown):
    """A loaded checkpoint.

    Attributes:
        denoiser: the network, in evaluation mode, on the CPU.
        scheduler: the checkpoint's own diffusers scheduler.
        event_shape: (channels, height, width) of one sample, an image or a latent.
        source: the name that it was loaded by.
        num_classes: number of classes that the network is conditioned on; None if it is not.
        decoder: from latents to images; None if samples are images.
        checkpoint: the folder that it came from; None if it was not loaded.
    """

    denoiser: DiffusersDenoiser
    scheduler: Any
    event_shape: tuple[int, ...]
    source: str
    num_classes: int | None = None
    decoder: Decoder | PipelineDecoder | None = None
    checkpoint: Checkpoint | None = None

    @property
    def family(self) -> PipelineFamily:
        """The family of its pipeline."""
        return PIXELS if self.checkpoint is None else self.checkpoint.family

    @property
    def condition(self) -> str | None:
        """What it is sampled under: "prompts", "classes" or None."""
        return self.family.condition or ("classes" if self.num_classes else None)

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline of this network and scheduler."""
        if self.checkpoint is None or self.family is PIXELS:
            return as_pipeline(self.denoiser, self.scheduler)
        return assembled(self.checkpoint, {self.family.part: self.denoiser.model, "scheduler": self.scheduler})


def load_pretrained(model: str | PathLike[str], *, frozen: bool = False) -> Pretrained:
    """Load a diffusers model: unconditional, class-conditional or text-conditional, of images or of latents.

    Args:
        model: "digits" (shipped with this package), a local diffusers folder (read without internet access), or a hub
            id `owner/name` (looked up in the local cache first; an unreachable hub is an error after seconds).
        frozen: whether the network's weights will not be trained, or its adapters alone. Those that were saved in half
            precision then stay in it (`denoisers.half_weights`); u is the same to the bit. `UNet2DModel`, which would
            round its times with them, is read in single precision all the same.

    Raises:
        InvalidInputError: no such model, not a diffusers pipeline of a known family, files that are damaged,
            incomplete, pickled or outside of the folder, sizes that its weights do not have, an autoencoder that
            belongs to another network, or a network that predicts a variance as well.
        MissingExtraError: diffusers or transformers is not installed.
    """
    check_type("frozen", frozen, bool, "it says whether the weights stay as they are")
    checkpoint, source = find_checkpoint(model), str(model)
    decoder = None
    family = checkpoint.family
    if family.probed:
        raise InvalidInputError(
            f"model: {source!r} is a {family.pipelines[0]}, whose chain is read off by running it: use "
            "read_pipeline(load_pipeline(model), num_steps, prompts=…)"
        )

    def evaluated(network: Any) -> None:
        shape = event_shape_of(network, family, source)
        _evaluate(network, family, shape, _num_classes(network, checkpoint, source))

    def decoded(vae: Any) -> None:
        decoder = Decoder(vae, shifted=family.shifted)
        check_latents(decoder, event_shape, source)

    with checkpoint.laid_out() as folder:
        own_dtype = frozen and family is not PIXELS
        network = load_network(checkpoint, folder, source, evaluated, own_dtype=own_dtype)
        event_shape = event_shape_of(network, family, source)
        if family.latent:
            vae = load_model(checkpoint, folder, "vae", "autoencoder", source, decoded)
            decoder = Decoder(vae, shifted=family.shifted)
    return Pretrained(
        denoiser=DiffusersDenoiser(network).eval(),
        scheduler=load_scheduler(checkpoint, source),
        event_shape=event_shape,
        source=source,
        num_classes=_num_classes(network, checkpoint, source),
        decoder=decoder,
        checkpoint=checkpoint,
    )


@main_only
def save_pipeline(
    folder: str | PathLike[str], denoiser: nn.Module, scheduler: Any, card: str, *, original: Pretrained | None = None
) -> Path:
    """Write a pipeline that `DiffusionPipeline.from_pretrained(folder)` of diffusers loads, with its model card.

    Args:
        folder: created if missing.
        denoiser: a `DiffusersDenoiser`, or guidance and embeddings around one; its model is saved as safetensors.
        scheduler: of diffusers. For a pipeline of images it must be a `DDIMScheduler` (saved as a DDIMPipeline), or one
            that a DDPMPipeline runs correctly: DDPM, first-order DPM-Solver, flow-matching Euler
            (`tables.pipeline_for` finds it). A pipeline does not store the number of steps, η or guidance, so the card
            should name them.
        card: Markdown of README.md. Metadata for the hub are put in front, unless it starts with its own (`---`).
        original: what `load_pretrained` returned; a latent pipeline gets its decoder and text encoders from there.

    Returns:
        The folder.

    Raises:
        InvalidInputError: the denoiser is not a `DiffusersDenoiser`, the scheduler is of another class, or a file of
            the original no longer exists; in the last case the network is already saved.
        MissingExtraError: diffusers is not installed.
    """
    check_type("card", card, str, "it is the Markdown of README.md")
    check_type("denoiser", denoiser, nn.Module, "use a DiffusersDenoiser")
    if original is not None:
        check_type("original", original, Pretrained, "use what load_pretrained returned, or None")
    folder, denoiser = check_path("folder", folder), unwrapped(denoiser)
    family = PIXELS if original is None else original.family
    if family is PIXELS:
        as_pipeline(denoiser, scheduler)  # raises, where it must, before anything is copied
    contiguous = copy.deepcopy(denoiser)
    torch.nn.utils.convert_conv2d_weight_memory_format(contiguous, torch.contiguous_format)  # safetensors needs it
    if original is None or original.checkpoint is None or family is PIXELS:
        as_pipeline(contiguous, scheduler).save_pretrained(folder, safe_serialization=True)
    else:
        _save_beside(folder, contiguous, scheduler, original.checkpoint)
    made = "video" if family.frames else "image"
    task = f"text-to-{made}" if family.condition == "prompts" else f"unconditional-{made}-generation"
    header = "" if card.startswith("---\n") else CARD_HEADER.format(task=task)
    (folder / "README.md").write_text(header + card.rstrip() + "\n", encoding="utf-8")
    return folder


def _save_beside(folder: Path, denoiser: Any, scheduler: Any, checkpoint: Checkpoint) -> None:
    """Save network and scheduler, and copy the files of all other parts."""
    part = checkpoint.family.part
    denoiser.model.save_pretrained(folder / part, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = checkpoint.index | {"scheduler": ["diffusers", type(scheduler).__name__]}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    kept = {name: source for name, source in checkpoint.files.items() if name.split("/")[0] not in (part, "scheduler")}
    copy_files(kept, folder)


def as_pipeline(denoiser: nn.Module, scheduler: Any) -> Any:
    """The diffusers pipeline of this network and scheduler; errors as in `save_pipeline`."""
    require("diffusers")
    import diffusers

    if not isinstance(denoiser, DiffusersDenoiser):
        raise InvalidInputError(
            f"denoiser: only a DiffusersDenoiser can be saved as a diffusers pipeline, got {type(denoiser).__name__}; "
            "save its state_dict yourself, with safetensors.torch.save_file."
        )
    if isinstance(scheduler, diffusers.DDIMScheduler):
        return diffusers.DDIMPipeline(unet=denoiser.model, scheduler=scheduler)
    if isinstance(scheduler, tuple(getattr(diffusers, name) for name in RUN_BY_DDPM_PIPELINE)):
        return diffusers.DDPMPipeline(unet=denoiser.model, scheduler=scheduler)
    raise InvalidInputError(
        f"scheduler: a {type(scheduler).__name__} has no unconditional pipeline in diffusers (DDPMPipeline starts at "
        "N(0, I) and does not scale the network's input); use DDPMScheduler or DDIMScheduler (`tables.scheduler_for`), "
        "which ancestral Euler and Euler are in other coordinates (`tables.pipeline_for`)."
    )


def _evaluate(network: Any, family: PipelineFamily, event_shape: tuple[int, ...], num_classes: int | None) -> None:
    """Evaluate a network without memory once, which fails where the sizes in its config do not fit together."""
    x, t, condition = meta_inputs(network, family, event_shape, num_classes=num_classes)
    u = DiffusersDenoiser(network)(x, t, **condition)
    if u.shape != x.shape:
        raise ValueError(f"it makes {tuple(u.shape)} of samples of shape {tuple(x.shape)}")


def meta_inputs(
    network: Any, family: PipelineFamily, event_shape: tuple[int, ...], n: int = 1, *, num_classes: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """x, t and a condition of two tokens for n samples, without memory."""
    x, t = torch.zeros(n, *event_shape, device="meta"), torch.zeros(n, device="meta")
    condition: dict[str, torch.Tensor] = {}
    if num_classes:
        condition["class_labels"] = torch.zeros(n, dtype=torch.long, device="meta")
    for name, keys in WIDTHS.items():
        if name in family.embeddings:
            width = next(network.config[key] for key in keys if network.config.get(key) is not None)
            length = () if name == "pooled_projections" else (2,)
            condition[name] = torch.zeros(n, *length, width, device="meta")
    return x, t, condition


def _num_classes(network: Any, checkpoint: Checkpoint, source: str) -> int | None:
    """The number of classes that the network is conditioned on; None if it is not."""
    config = network.config
    if checkpoint.family.condition == "classes":
        return int(config.num_embeds_ada_norm)  # DiT, whose embedding has one more row, for no class
    if checkpoint.family is PIXELS and config.class_embed_type is not None:
        raise InvalidInputError(
            f"model: the network of {source!r} embeds its classes by {config.class_embed_type!r}; class-conditional "
            "networks need class labels, i.e. num_class_embeds without a class_embed_type."
        )
    return config.get("num_class_embeds")


def event_shape_of(network: Any, family: PipelineFamily, source: str) -> tuple[int, ...]:
    """The shape of a sample, checked to be one that can exist."""
    config = network.config
    channels, size = config.in_channels, config.sample_size
    if config.out_channels != channels and family.condition != "classes":
        raise InvalidInputError(
            f"model: the network of {source!r} returns {config.out_channels} channels for "
            f"{channels}, so it predicts a variance as well; only a mean can be fine-tuned so far."
        )
    if size is None:
        raise InvalidInputError(f"model: the config of {source!r} has no sample_size, the height and width.")
    shape = (channels, *((size, size) if isinstance(size, int) else size if isinstance(size, list | tuple) else ()))
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if len(shape) != 3 or not whole or math.prod(shape) > LARGEST_SAMPLE:
        raise InvalidInputError(
            f"model: the config of {source!r} has in_channels = {channels!r} and sample_size = {one_line(repr(size))}; "
            f"they must be positive whole numbers, a height and a width, with at most {LARGEST_SAMPLE} in a sample."
        )
    return shape
