"""A Python program that uses an exported model without this package's commands, for model cards and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from implicit_diffusion.commands.rewards.trust import spelled
from implicit_diffusion.models.own_models.files import WEIGHTS

OWN_ADAPTER = 'peft.PeftModel.from_pretrained(model.denoiser, "lora")'  # `model` as a factory returns it
LABELS = """import torch

labels = torch.tensor({labels})
x = torch.randn(len(labels), {event})
pipeline.scheduler.set_timesteps({num_steps})
for t in pipeline.scheduler.timesteps:  # DDPMPipeline itself passes no labels
    u = pipeline.unet(x, t, class_labels=labels).sample{guided}
    x = pipeline.scheduler.step(u, t, x{eta}).prev_sample"""
GUIDED = """
    without = pipeline.unet(x, t, class_labels=torch.full_like(labels, {null})).sample
    u = without + {guidance:g} * (u - without)"""


@dataclass(frozen=True)
class PipelineUse:
    """What a program needs to know of an exported pipeline.

    Args:
        num_steps: number of sampling steps.
        condition: "prompts", "classes", or None for an unconditional model.
        pipeline_class: name of the pipeline in diffusers; None where it is not known.
        event_shape: of a sample.
        eta: noise of DDIM; None for other samplers.
        guidance: scale of classifier-free guidance, for a conditional model.
        num_classes: of a class-conditional model.
        null_class: the label that stands for no class; None where the model has none.
        size: height and width in pixels; None for those of the pipeline.
        frames: of a video; None for those of the pipeline.
        video: whether it makes videos.
        factory: FILE.py:function that makes the network; None for a pipeline.
    """

    num_steps: int
    condition: str | None
    pipeline_class: str | None
    event_shape: Sequence[int]
    eta: float | None = None
    guidance: float | None = None
    num_classes: int | None = None
    null_class: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    video: bool = False
    factory: str | None = None


def usage(use: PipelineUse) -> str:
    """The lines after `pipeline = DiffusionPipeline.from_pretrained(...)`."""
    eta = "" if use.eta is None else f", eta={use.eta:g}"
    steps = f"num_inference_steps={use.num_steps}"
    if use.condition is None:
        return f"images = pipeline(batch_size=16, {steps}{eta}).images"
    if use.condition == "prompts":
        guided = "" if use.guidance is None else f", guidance_scale={use.guidance:g}"
        sizes = "" if use.size is None else f", height={use.size[0]}, width={use.size[1]}"
        sizes += "" if use.frames is None else f", num_frames={use.frames}"
        made = "frames" if use.video else "images"
        return f'{made} = pipeline(["a prompt of yours"] * 4, {steps}{eta}{guided}{sizes}).{made}'
    assert use.guidance is not None
    if use.pipeline_class == "DiTPipeline":
        return f"images = pipeline([0, 1], {steps}, guidance_scale={use.guidance:g}).images"
    guided = "" if use.guidance == 1 else GUIDED.format(null=use.null_class, guidance=use.guidance)
    labels = [label for label in range(use.num_classes or 0) if label != use.null_class][:4]
    event = ", ".join(map(str, use.event_shape))
    return LABELS.format(labels=labels, event=event, num_steps=use.num_steps, guided=guided, eta=eta)


def program(use: PipelineUse, folder: str) -> str:
    """The whole program.

    Args:
        use: of the model.
        folder: where it is.
    """
    if use.factory is None:
        return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({folder!r})
{usage(use)}"""
    place, function, call = spelled(use.factory)
    return f"""import runpy

from safetensors.torch import load_file

model = runpy.run_path({place!r})[{function!r}]{call or "()"}
model.denoiser.load_state_dict(load_file({f"{folder}/{WEIGHTS}"!r}))"""
