"""Models of diffusers: load one as a denoiser, save the result as a pipeline.

load_pretrained("digits")  →  Pretrained(denoiser, scheduler, event_shape)
scheduler_for(scheduler, "ddpm", clip=False)  →  a scheduler that `read_table` can read (`denoisers.kinds`)
save_pipeline(folder, denoiser, scheduler, card)  →  a folder that plain DiffusionPipeline.from_pretrained loads
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from implicit_diffusion.denoisers.checkpoints import Checkpoint, find_checkpoint
from implicit_diffusion.denoisers.kinds import scheduler_for as scheduler_for
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
pipeline_tag: unconditional-image-generation
tags:
- diffusers
- implicit-diffusion
---

"""


class DiffusersDenoiser(nn.Module):
    """A diffusers model such as `UNet2DModel` as a denoiser u(x, t).

    Args:
        model: called as model(x, t, return_dict=False, **condition); the first thing that it returns is u.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Any
    ) -> Float[Tensor, "batch *event"]:
        """u(x, t) with one time per sample; `condition` (class labels, say) goes to the model as it is."""
        return self.model(x, t, return_dict=False, **condition)[0]


@dataclass(frozen=True)
class Pretrained:
    """A loaded checkpoint.

    Attributes:
        denoiser: the network, in evaluation mode, on the CPU.
        scheduler: the checkpoint's own diffusers scheduler.
        event_shape: (channels, height, width) of one sample.
        source: the name that was asked for.
    """

    denoiser: DiffusersDenoiser
    scheduler: Any
    event_shape: tuple[int, ...]
    source: str

    @property
    def pipeline(self) -> Any:
        """A `DDPMPipeline` or `DDIMPipeline` that shares this network and scheduler. Raises as `save_pipeline`."""
        return as_pipeline(self.denoiser, self.scheduler)


def load_pretrained(model: str | Path) -> Pretrained:
    """Load an unconditional diffusers model.

    Args:
        model: "digits" (shipped with this package), a local diffusers folder (never touches the network), or a hub id
            `owner/name` (looked up in the local cache first; an unreachable hub is an error after seconds).

    Raises:
        InvalidInputError: no such model, no unconditional diffusers pipeline, pickled or incomplete weights, a class-
            conditional network, or one that predicts a variance as well.
    """
    checkpoint = find_checkpoint(model)
    unet = _load_unet(checkpoint, str(model))
    return Pretrained(
        denoiser=DiffusersDenoiser(unet).eval(),
        scheduler=_load_scheduler(checkpoint, str(model)),
        event_shape=_event_shape(unet, str(model)),
        source=str(model),
    )


def save_pipeline(folder: str | Path, denoiser: nn.Module, scheduler: Any, card: str) -> Path:
    """Write a pipeline that plain `DiffusionPipeline.from_pretrained(folder)` loads, with its model card.

    Args:
        folder: created where missing.
        denoiser: a `DiffusersDenoiser`; its model is saved as safetensors.
        scheduler: a `DDIMScheduler` (saved as a DDIMPipeline), or one whose steps a DDPMPipeline makes as they are:
            DDPM, first-order DPM-Solver, flow-matching Euler (`denoisers.kinds.pipeline_for`). A pipeline does not
            store the number of steps or η: the card should say them.
        card: Markdown of README.md. Hub metadata are put in front unless it starts with its own (`---`).

    Returns:
        The folder.

    Raises:
        InvalidInputError: the denoiser is no `DiffusersDenoiser`, or the scheduler of another class.
    """
    folder = Path(folder)
    as_pipeline(denoiser, scheduler)  # refuses what is none before anything is copied
    plain = copy.deepcopy(denoiser)
    torch.nn.utils.convert_conv2d_weight_memory_format(plain, torch.contiguous_format)  # safetensors wants it so
    as_pipeline(plain, scheduler).save_pretrained(folder, safe_serialization=True)
    header = "" if card.startswith("---\n") else CARD_HEADER
    (folder / "README.md").write_text(header + card.rstrip() + "\n", encoding="utf-8")
    return folder


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


def _load_unet(checkpoint: Checkpoint, source: str) -> Any:
    from diffusers import UNet2DModel

    try:
        unet, info = UNet2DModel.from_pretrained(
            str(checkpoint.unet),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, ... by kind of damage
        raise InvalidInputError(f"model: the network of {source!r} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        # diffusers would only warn, and leave these weights random.
        missing = info["missing_keys"]
        raise InvalidInputError(
            f"model: the weights of {source!r} lack {len(missing)} tensors that its config asks for, "
            f"such as {sorted(missing)[0]!r}."
        )
    if unet.config.out_channels != unet.config.in_channels:
        raise InvalidInputError(
            f"model: the network of {source!r} returns {unet.config.out_channels} channels for "
            f"{unet.config.in_channels}, so it predicts a variance as well; only a mean can be fine-tuned so far."
        )
    if unet.config.class_embed_type is not None or unet.config.num_class_embeds is not None:
        raise InvalidInputError(
            f"model: the network of {source!r} is class-conditional; only unconditional ones can be fine-tuned so far."
        )
    unet.register_to_config(_name_or_path="")  # a local path, which would be saved with the result
    return unet


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
