"""A Python program that draws from an exported pipeline with plain diffusers, for model cards and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def usage(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The lines after `pipeline = DiffusionPipeline.from_pretrained(...)`.

    Args:
        config: of the run, resolved.
        summary: of the run, for `condition` and `pipeline_class`; where it lacks them, the model is unconditional.
    """
    eta = f", eta={config.get('eta', 1.0):g}" if config["scheduler"] == "ddim" else ""
    condition, guidance = summary.get("condition"), config.get("guidance")
    steps = f"num_inference_steps={config['num_steps']}"
    if condition == "prompts":
        return f'images = pipeline(["a prompt of yours"] * 4, {steps}{eta}, guidance_scale={guidance:g}).images'
    if condition == "classes" and summary["pipeline_class"] == "DiTPipeline":
        return f"images = pipeline([0, 1], {steps}, guidance_scale={guidance:g}).images"
    if condition == "classes":
        guided = "" if guidance == 1 else GUIDED.format(null=config["null_class"], guidance=guidance)
        labels = [label for label in range(summary["num_classes"]) if label != config["null_class"]][:4]
        event = ", ".join(map(str, summary["event_shape"]))
        return LABELS.format(labels=labels, event=event, num_steps=config["num_steps"], guided=guided, eta=eta)
    return f"images = pipeline(batch_size=16, {steps}{eta}).images"
