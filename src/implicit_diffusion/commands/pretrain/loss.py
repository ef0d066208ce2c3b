"""The loss of a pretraining, image by image, and its means on images that were and were not trained on.

The derivation is in `pretrain.training`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from implicit_diffusion.commands.pretrain.images.loading import Images, as_floats
from implicit_diffusion.processes import share
from implicit_diffusion.runs import progress

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

REPEATS = 20  # times and noises per image, by which a loss is judged
SMALL, FEWER = 256, 4  # pixels of an image up to which there are as many, and how many there are of larger ones
MOST = 2000  # images that were trained on, on which it is judged


def image_losses(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    x: Tensor,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> Tensor:
    """|u(x_t, t, label) - target|^2 per pixel, at random times and noise, with shape (batch,).

    Where samples are shared out over processes, these are the losses of this process's images; all draw the same.
    """
    x = as_floats(x)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    x, t, noise = share(x), share(t), share(noise)
    labels = None if labels is None else share(labels)
    targets = {
        "v_prediction": lambda: scheduler.get_velocity(x, noise, t),
        "epsilon": lambda: noise,
        "sample": lambda: x,
    }
    target = targets[scheduler.config.prediction_type]().to(unet.device)
    given = {} if labels is None else {"class_labels": labels.to(unet.device)}
    prediction = unet(scheduler.add_noise(x, noise, t).to(unet.device), t.to(unet.device), **given).sample
    return (prediction - target).square().flatten(1).mean(1)


def judged_losses(unet: UNet2DModel, scheduler: DDPMScheduler, data: Images) -> tuple[float, float]:
    """On images that were trained on, and on those that were not."""
    few = min(10 * len(data.held_out), MOST)
    repeats = REPEATS if data.train[0, 0].numel() <= SMALL else FEWER
    some = None if data.train_labels is None else data.train_labels[:few]
    train, held_out = (data.train[:few], some), (data.held_out, data.held_out_labels)
    with progress(repeats * (len(train[0]) + len(held_out[0])), "judging") as bar:
        losses = [denoising_loss(unet, scheduler, x, repeats, c, bar.advance) for x, c in (train, held_out)]
    return losses[0], losses[1]


@torch.no_grad()
def denoising_loss(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    x: Tensor,
    repeats: int = REPEATS,
    labels: Tensor | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> float:
    """The loss of the trained network on given images, the same `repeats` times and noises per image at each call.

    Much lower on training images than on held-out ones means that the network has memorised the former.
    """
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(repeats):
        for i in range(0, len(x), 4096):  # parts that fit into a call
            piece, own = x[i : i + 4096], None if labels is None else labels[i : i + 4096]
            losses.append(image_losses(unet, scheduler, piece, generator, own))
            tick(len(piece))
    return torch.cat(losses).mean().item()
