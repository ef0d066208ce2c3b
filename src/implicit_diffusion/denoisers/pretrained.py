"""Models of diffusers: load one as a denoiser, save the result as a pipeline.

load_pretrained("digits")  →  Pretrained(denoiser, scheduler, event_shape)
scheduler_for(scheduler, "ddpm", clip=False)  →  a scheduler that `read_table` can read (`denoisers.kinds`)
save_pipeline(folder, denoiser, scheduler, card)  →  a folder that plain DiffusionPipeline.from_pretrained loads

What is not trained, text encoders and decoders, is copied from the original folder as the files that it is.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser as DiffusersDenoiser
from implicit_diffusion.denoisers.adapter import inner
from implicit_diffusion.denoisers.checkpoints import PICKLES, Checkpoint, find_checkpoint
from implicit_diffusion.denoisers.families import PIXELS, Family
from implicit_diffusion.denoisers.kinds import scheduler_for as scheduler_for
from implicit_diffusion.denoisers.latents import Decoder, check_latents
from implicit_diffusion.errors import InvalidInputError

# Their steps are functions of (u, t, x) as they are, from N(0, I): what DDPMPipeline does with any scheduler.
RUN_BY_DDPM_PIPELINE = (
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
CARD_HEADER = """---
library_name: diffusers
pipeline_tag: {task}
tags:
- diffusers
- implicit-diffusion
---

"""


@dataclass(frozen=True)
class Pretrained:
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
        import diffusers

        given = {self.family.part: self.denoiser.model, "scheduler": self.scheduler}
        pipeline_class = getattr(diffusers, self.family.pipelines[0])
        folder = str(self.checkpoint.folder)
        return pipeline_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **given)


def load_pretrained(model: str | Path) -> Pretrained:
    """Load a diffusers model: unconditional, class-conditional or text-conditional, of images or of latents.

    Args:
        model: "digits" (shipped with this package), a local diffusers folder (never touches the network), or a hub id
            `owner/name` (looked up in the local cache first; an unreachable hub is an error after seconds).

    Raises:
        InvalidInputError: no such model, no diffusers pipeline of a known family, pickled or incomplete weights, an
            autoencoder that belongs to another network, or a network that predicts a variance as well.
    """
    checkpoint = find_checkpoint(model)
    network = _load_network(checkpoint, str(model))
    event_shape = _event_shape(network, str(model))
    decoder = None
    if checkpoint.family.latent:
        decoder = Decoder(_load_part("AutoencoderKL", checkpoint.folder / "vae", "autoencoder", str(model)))
        check_latents(decoder, event_shape[0], str(model))
    return Pretrained(
        denoiser=DiffusersDenoiser(network).eval(),
        scheduler=_load_scheduler(checkpoint, str(model)),
        event_shape=event_shape,
        source=str(model),
        num_classes=_num_classes(network, checkpoint, str(model)),
        decoder=decoder,
        checkpoint=checkpoint,
    )


def save_pipeline(
    folder: str | Path, denoiser: nn.Module, scheduler: Any, card: str, *, original: Pretrained | None = None
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
        InvalidInputError: the denoiser is no `DiffusersDenoiser`, or the scheduler of another class.
    """
    folder, denoiser = Path(folder), inner(denoiser)
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


def save_adapter(folder: Path, adapter: dict[str, torch.Tensor], original: Pretrained) -> Path | None:
    """Write a low-rank adapter that `pipeline.load_lora_weights(folder)` adds to the original pipeline.

    Args:
        folder: created where missing.
        adapter: weights under peft's names, from `adapter_of`.
        original: what was loaded.

    Returns:
        The folder; None where this kind of pipeline cannot load adapters.
    """
    import diffusers

    family = original.family
    pipeline_class: Any = getattr(diffusers, family.pipelines[0]) if family.pipelines else None
    if not hasattr(pipeline_class, "save_lora_weights"):
        return None
    pipeline_class.save_lora_weights(folder, **{f"{family.part}_lora_layers": adapter}, safe_serialization=True)
    return folder


def _save_beside(folder: Path, denoiser: Any, scheduler: Any, checkpoint: Checkpoint) -> None:
    """Network and scheduler as they are now, all other parts as the files that they were."""
    part = checkpoint.family.part
    for other in checkpoint.parts.keys() - {part, "scheduler"}:
        pickles = shutil.ignore_patterns(*(f"*{ending}" for ending in PICKLES))
        shutil.copytree(checkpoint.folder / other, folder / other, ignore=pickles, dirs_exist_ok=True)
    denoiser.model.save_pretrained(folder / part, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = {key: value for key, value in checkpoint.index.items() if key != "_name_or_path"}
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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


def _load_part(class_name: str, folder: Path, what: str, source: str) -> Any:
    """A model of diffusers with all its weights."""
    import diffusers

    try:
        part, info = getattr(diffusers, class_name).from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, ... by kind of damage
        raise InvalidInputError(f"model: the {what} of {source!r} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        # diffusers would only warn, and leave these weights random.
        missing = info["missing_keys"]
        raise InvalidInputError(
            f"model: the weights of {source!r} lack {len(missing)} tensors that its config asks for, "
            f"such as {sorted(missing)[0]!r}."
        )
    return part


def _load_network(checkpoint: Checkpoint, source: str) -> Any:
    network = _load_part(checkpoint.family.network, checkpoint.network, "network", source)
    channels = network.config.in_channels
    if network.config.out_channels != channels and checkpoint.family.condition != "classes":
        raise InvalidInputError(
            f"model: the network of {source!r} returns {network.config.out_channels} channels for "
            f"{channels}, so it predicts a variance as well; only a mean can be fine-tuned so far."
        )
    network.register_to_config(_name_or_path="")  # a local path, which would be saved with the result
    return network


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


def _load_scheduler(checkpoint: Checkpoint, source: str) -> Any:
    import diffusers

    found = getattr(diffusers, checkpoint.scheduler_class, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise InvalidInputError(
            f"model: {source!r} asks for the scheduler {checkpoint.scheduler_class!r}, which diffusers "
            f"{diffusers.__version__} does not have; set DDPMScheduler or DDIMScheduler in its model_index.json."
        )
    scheduler_class: Any = found
    try:
        return scheduler_class.from_pretrained(str(checkpoint.scheduler), local_files_only=True)
    except Exception as error:  # as above
        raise InvalidInputError(f"model: the scheduler of {source!r} cannot be loaded: {error}") from error


def _event_shape(unet: Any, source: str) -> tuple[int, ...]:
    size = unet.config.sample_size
    if size is None:
        raise InvalidInputError(f"model: the config of {source!r} names no sample_size, the height and width.")
    height_width = (size, size) if isinstance(size, int) else tuple(size)
    return (unet.config.in_channels, *height_width)
