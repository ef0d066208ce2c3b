"""The model card of a model that was pretrained on images of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from implicit_diffusion.commands.pretrain.config import Config
from implicit_diffusion.commands.pretrain.images.classes import card_section, drawing
from implicit_diffusion.commands.pretrain.quality import in_words
from implicit_diffusion.commands.pretrain.summary import Summary
from implicit_diffusion.commands.shared.formatting import markdown


def title(data: str) -> str:
    """What the images are called: the id of a data set, or a folder's own name, not where it lies."""
    return markdown(Path(data).name if os.path.isabs(data) else data)


def model_card(config: Config, summary: Summary) -> str:
    """The README.md of the model folder: what it is, how it was made, and how to use it."""
    assert config.channels is not None  # resolved
    images = summary.images
    channels, height, width = images.event_shape
    colour = "grey" if channels == 1 else "colour"
    size, seconds = f"--size {height} {width}", f"{summary.seconds:.0f} s"
    made = f"{summary.updates} steps"
    if summary.updates < config.steps:
        made = f"{summary.updates} of {config.steps} planned steps"
    words = [f"chains of {n} steps: {in_words(quality)}" for n, quality in (summary.image_quality or {}).items()]
    judged = "".join(f"\n\nSamples of {line}." for line in words)
    data, asked = title(config.data), " --classes" if config.classes else ""
    prediction, schedule = map(markdown, (config.prediction_type, config.beta_schedule))
    return f"""# A diffusion model of {data}

A `UNet2DModel` with {summary.parameters} parameters (channels {", ".join(map(str, config.channels))}), trained by
denoising score matching ({prediction}, schedule {schedule}, {made} of
{config.batch} images, {seconds}) on {images.train} {colour} images of {height} by {width} pixels.
It is made for ancestral chains with trailing spacing and without clipping, which its scheduler says too. Made by

    implicit-diffusion pretrain --data DATA{asked} {size} --steps {config.steps} --batch {config.batch} \\
        --lr {config.lr:g} --seed {config.seed} --out DIR

where DATA is {data}. The denoising loss is {summary.loss_train:.4f} on training images and
{summary.loss_held_out:.4f} on {images.held_out} images held out.{judged}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("this folder")
{drawing(images)}
```
{card_section(images.classes)}"""
