"""The model card of a model that was pretrained on images of the user's own."""

import html
import os
import shlex
from pathlib import Path
from typing import Any


def title(data: str) -> str:
    """What the images are called, as a heading."""
    return html.escape(_name(data))


def _name(data: str) -> str:
    """The id of a data set, or a folder's own name, not where it lies; in one line."""
    return " ".join((Path(data).name if os.path.isabs(data) else data).split())


def model_card(summary: dict[str, Any]) -> str:
    """The README.md of the model folder: what it is, how it was made, and how to use it."""
    config, images = summary["config"], summary["images"]
    channels, height, width = images["event_shape"]
    colour = "grey" if channels == 1 else "colour"
    data = shlex.quote(_name(config["data"]))
    size, seconds = f"--size {height} {width}", f"{summary['seconds']:.0f} s"
    return f"""# A diffusion model of {title(config["data"])}

A `UNet2DModel` with {summary["parameters"]} parameters (channels {", ".join(map(str, config["channels"]))}), trained by
denoising score matching ({config["prediction_type"]}, schedule {config["beta_schedule"]}, {config["steps"]} steps of
{config["batch"]} images, {seconds}) on {images["train"]} {colour} images of {height} by {width} pixels.
It is made for ancestral chains with trailing spacing and without clipping, which its scheduler says too. Made by

    implicit-diffusion pretrain --data {data} {size} --steps {config["steps"]} --batch {config["batch"]} \\
        --lr {config["lr"]:g} --seed {config["seed"]} --out DIR

The denoising loss is {summary["loss_train"]:.4f} on training images and {summary["loss_held_out"]:.4f} on
{images["held_out"]} images held out.

```python
from diffusers import DiffusionPipeline

images = DiffusionPipeline.from_pretrained("this folder")(batch_size=16, num_inference_steps=50).images
```
"""
