"""Models of diffusers: load one as a denoiser, save the result as a pipeline.

load_pretrained("digits")  →  Pretrained(denoiser, scheduler, event_shape)
scheduler_for(scheduler, "ddpm", clip=False)  →  a scheduler that `read_table` can read (`denoisers.kinds`)
save_pipeline(folder, denoiser, scheduler, card)  →  a folder that plain DiffusionPipeline.from_pretrained loads

What is not trained, text encoders and decoders, is copied from the original folder: the files that a pipeline consists
of (`files`) and no others, as files of the user's own.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser as DiffusersDenoiser
from implicit_diffusion.denoisers.adapter import inner
from implicit_diffusion.denoisers.lora import adapter_of
from implicit_diffusion.errors import InvalidInputError, check_path, check_type
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.models.checkpoints import INDEX, Checkpoint, find_checkpoint
from implicit_diffusion.models.decoders import Decoder, check_latents
from implicit_diffusion.models.families import PIXELS, WIDTHS, Family
from implicit_diffusion.models.parts import load_model, load_scheduler
from implicit_diffusion.models.pipeline_files import copied
from implicit_diffusion.models.prompts import assembled
from implicit_diffusion.showing import Shown

# Their steps are functions of (u, t, x) as they are, from N(0, I): what DDPMPipeline does with any scheduler.
RUN_BY_DDPM_PIPELINE = (
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
PEFT_WEIGHTS = "adapter_model.safetensors"  # the name that peft looks for
LARGEST = 2**28  # numbers of one sample
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
        source: the name that was asked for.
        num_classes: that the network is conditioned on; None where it is not.
        decoder: from latents to images; None where samples are images.
        checkpoint: the folder it came from; None where it came from nowhere.
    """

    denoiser: DiffusersDenoiser
    scheduler: Any
    event_shape: tuple[int, ...]
    source: str
    num_classes: int | None = None
    decoder: Decoder | None = None
    checkpoint: Checkpoint | None = None

    @property
    def family(self) -> Family:
        """Which kind of pipeline it is."""
        return PIXELS if self.checkpoint is None else self.checkpoint.family

    @property
    def condition(self) -> str | None:
        """What it is sampled under: "prompts", "classes" or nothing."""
        return self.family.condition or ("classes" if self.num_classes else None)

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline of this network and scheduler."""
        if self.checkpoint is None or self.family is PIXELS:
            return as_pipeline(self.denoiser, self.scheduler)
        return assembled(self.checkpoint, {self.family.part: self.denoiser.model, "scheduler": self.scheduler})


def load_pretrained(model: str | PathLike[str]) -> Pretrained:
    """Load a diffusers model: unconditional, class-conditional or text-conditional, of images or of latents.

    Args:
        model: "digits" (shipped with this package), a local diffusers folder (never touches the network), or a hub id
            `owner/name` (looked up in the local cache first; an unreachable hub is an error after seconds).

    Raises:
        InvalidInputError: no such model, no diffusers pipeline of a known family, files that are damaged, incomplete,
            pickled or lie elsewhere, sizes that its weights do not have, an autoencoder that belongs to another
            network, or a network that predicts a variance as well.
    """
    checkpoint, source = find_checkpoint(model), str(model)
    decoder = None
    family = checkpoint.family

    def evaluated(network: Any) -> None:
        shape = _event_shape(network, family, source)
        _evaluate(network, family, shape, _num_classes(network, checkpoint, source))

    def decoded(vae: Any) -> None:
        decoder = Decoder(vae, shifted=family.shifted)
        check_latents(decoder, event_shape, source)

    with checkpoint.laid_out() as folder:
        network = load_model(checkpoint, folder, family.part, "network", source, evaluated)
        event_shape = _event_shape(network, family, source)
        if family.latent:
            vae = load_model(checkpoint, folder, "vae", "autoencoder", source, decoded)
            decoder = Decoder(vae, shifted=family.shifted)
    network.register_to_config(_name_or_path="")  # a local path, which would be saved with the result
    return Pretrained(
        denoiser=DiffusersDenoiser(network).eval(),
        scheduler=load_scheduler(checkpoint, source),
        event_shape=event_shape,
        source=source,
        num_classes=_num_classes(network, checkpoint, source),
        decoder=decoder,
        checkpoint=checkpoint,
    )


def save_pipeline(
    folder: str | PathLike[str], denoiser: nn.Module, scheduler: Any, card: str, *, original: Pretrained | None = None
) -> Path:
    """Write a pipeline that plain `DiffusionPipeline.from_pretrained(folder)` loads, with its model card.

    Args:
        folder: created where missing.
        denoiser: a `DiffusersDenoiser`, or guidance and embeddings around one; its model is saved as safetensors.
        scheduler: of diffusers. A pipeline of images takes a `DDIMScheduler` (saved as a DDIMPipeline), or one whose
            steps a DDPMPipeline makes as they are: DDPM, first-order DPM-Solver, flow-matching Euler
            (`denoisers.kinds.pipeline_for`). A pipeline does not store the number of steps, η or guidance: the card
            should say them.
        card: Markdown of README.md. Hub metadata are put in front unless it starts with its own (`---`).
        original: what was loaded; a latent pipeline gets its decoder and text encoders from there.

    Returns:
        The folder.

    Raises:
        InvalidInputError: the denoiser is no `DiffusersDenoiser`, the scheduler of another class, or a file of the
            original has gone; the network is saved by then.
    """
    check_type("card", card, str, "it is the Markdown of README.md")
    check_type("denoiser", denoiser, nn.Module, "take a DiffusersDenoiser")
    if original is not None:
        check_type("original", original, Pretrained, "take what load_pretrained returned, or None")
    folder, denoiser = check_path("folder", folder), inner(denoiser)
    family = PIXELS if original is None else original.family
    if family is PIXELS:
        as_pipeline(denoiser, scheduler)  # refuses what is none before anything is copied
    plain = copy.deepcopy(denoiser)
    torch.nn.utils.convert_conv2d_weight_memory_format(plain, torch.contiguous_format)  # safetensors wants it so
    if original is None or original.checkpoint is None or family is PIXELS:
        as_pipeline(plain, scheduler).save_pretrained(folder, safe_serialization=True)
    else:
        _save_beside(folder, plain, scheduler, original.checkpoint)
    task = "text-to-image" if family.condition == "prompts" else "unconditional-image-generation"
    header = "" if card.startswith("---\n") else CARD_HEADER.format(task=task)
    (folder / "README.md").write_text(header + card.rstrip() + "\n", encoding="utf-8")
    return folder


def save_adapter(folder: str | PathLike[str], denoiser: nn.Module, original: Pretrained) -> Path:
    """Write the low-rank adapter inside a denoiser, for the original pipeline: `adapter_usage` says how it is loaded.

    A pipeline that knows adapters gets them in the format of diffusers; for the networks of others (`UNet2DModel`, DiT)
    they are in that of peft, `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: created where missing.
        denoiser: with an adapter inside.
        original: what was loaded.

    Returns:
        The folder.

    Raises:
        InvalidInputError: a denoiser without an adapter.
    """
    check_type("denoiser", denoiser, nn.Module, "take one that add_lora put adapters into")
    folder, adapter, family = check_path("folder", folder), adapter_of(denoiser), original.family
    if adapter is None:
        raise InvalidInputError(f"denoiser {type(denoiser).__name__} has no adapter inside; add_lora puts them in")
    pipeline_class = _pipeline_class(family)
    if hasattr(pipeline_class, "save_lora_weights"):
        pipeline_class.save_lora_weights(folder, **{f"{family.part}_lora_layers": adapter}, safe_serialization=True)
        return folder
    network: Any = inner(denoiser)
    (config,) = network.model.peft_config.values()
    folder.mkdir(parents=True, exist_ok=True)
    replace(config, target_modules=sorted(config.target_modules)).save_pretrained(folder)
    save_file({f"base_model.model.{name}": weight for name, weight in adapter.items()}, folder / PEFT_WEIGHTS)
    return folder


def adapter_usage(family: Family) -> str:
    """The line of Python that adds an adapter, in the folder "lora", to the original pipeline."""
    if hasattr(_pipeline_class(family), "load_lora_weights"):
        return 'pipeline.load_lora_weights("lora")'
    return f'peft.PeftModel.from_pretrained(pipeline.{family.part}, "lora")'


def _pipeline_class(family: Family) -> Any:
    """The class in diffusers; None where the parts alone decide."""
    import diffusers

    return getattr(diffusers, family.pipelines[0]) if family.pipelines else None


def _save_beside(folder: Path, denoiser: Any, scheduler: Any, checkpoint: Checkpoint) -> None:
    """Network and scheduler as they are now, all other parts as the files that they were."""
    part = checkpoint.family.part
    denoiser.model.save_pretrained(folder / part, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = checkpoint.index | {"scheduler": ["diffusers", type(scheduler).__name__]}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    kept = {name: source for name, source in checkpoint.files.items() if name.split("/")[0] not in (part, "scheduler")}
    copied(kept, folder)


def as_pipeline(denoiser: nn.Module, scheduler: Any) -> Any:
    """The diffusers pipeline of this network and scheduler. Raises as `save_pipeline`."""
    import diffusers

    if not isinstance(denoiser, DiffusersDenoiser):
        raise InvalidInputError(
            f"denoiser: only a DiffusersDenoiser is a diffusers pipeline, got {type(denoiser).__name__}; save its "
            "state_dict yourself, with safetensors.torch.save_file."
        )
    if isinstance(scheduler, diffusers.DDIMScheduler):
        return diffusers.DDIMPipeline(unet=denoiser.model, scheduler=scheduler)
    if isinstance(scheduler, tuple(getattr(diffusers, name) for name in RUN_BY_DDPM_PIPELINE)):
        return diffusers.DDPMPipeline(unet=denoiser.model, scheduler=scheduler)
    raise InvalidInputError(
        f"scheduler: a {type(scheduler).__name__} has no unconditional pipeline in diffusers (DDPMPipeline starts at "
        "N(0, I) and does not scale the network's input); take DDPMScheduler or DDIMScheduler (`scheduler_for`), which "
        "ancestral Euler and Euler are in other coordinates (`pipeline_for`)."
    )


def _evaluate(network: Any, family: Family, event_shape: tuple[int, ...], num_classes: int | None) -> None:
    """One evaluation of a network without memory; raises what goes wrong, which the numbers in a config can make."""
    config = network.config
    x, t = torch.zeros(1, *event_shape, device="meta"), torch.zeros(1, device="meta")
    condition: dict[str, torch.Tensor] = {}
    if num_classes:
        condition["class_labels"] = torch.zeros(1, dtype=torch.long, device="meta")
    for name, keys in WIDTHS.items():
        if name in family.embeddings:
            width = next(config[key] for key in keys if config.get(key) is not None)
            length = () if name == "pooled_projections" else (2,)
            condition[name] = torch.zeros(1, *length, width, device="meta")
    u = DiffusersDenoiser(network)(x, t, **condition)
    if u.shape != x.shape:
        raise ValueError(f"it makes {tuple(u.shape)} of samples of shape {tuple(x.shape)}")


def _num_classes(network: Any, checkpoint: Checkpoint, source: str) -> int | None:
    """How many classes the network tells apart."""
    config = network.config
    if checkpoint.family.condition == "classes":
        return int(config.num_embeds_ada_norm)  # DiT; one more row of its embedding stands for no class
    if checkpoint.family is PIXELS and config.class_embed_type is not None:
        raise InvalidInputError(
            f"model: the network of {source!r} embeds its classes by {config.class_embed_type!r}; class-conditional "
            "networks need class labels, i.e. num_class_embeds without a class_embed_type."
        )
    return config.get("num_class_embeds")


def _event_shape(network: Any, family: Family, source: str) -> tuple[int, ...]:
    """The shape of a sample, as far as the config names one that can be."""
    config = network.config
    channels, size = config.in_channels, config.sample_size
    if config.out_channels != channels and family.condition != "classes":
        raise InvalidInputError(
            f"model: the network of {source!r} returns {config.out_channels} channels for "
            f"{channels}, so it predicts a variance as well; only a mean can be fine-tuned so far."
        )
    if size is None:
        raise InvalidInputError(f"model: the config of {source!r} names no sample_size, the height and width.")
    shape = (channels, *((size, size) if isinstance(size, int) else size if isinstance(size, list | tuple) else ()))
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if len(shape) != 3 or not whole or math.prod(shape) > LARGEST:
        raise InvalidInputError(
            f"model: the config of {source!r} has in_channels = {channels!r} and sample_size = {one_line(repr(size))}; "
            f"they must be positive whole numbers, a height and a width, of at most {LARGEST} numbers a sample."
        )
    return shape
