"""Samples of a pretrained model: drawn by chains of several lengths, and shown beside real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.pretrain.images import classes as image_classes
from implicit_diffusion.commands.pretrain.images.loading import Images, as_floats
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.digits import EVENT_SHAPE
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.runs.clock import part
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.scheduler import read_table

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

WIDTH, TITLE = 5.2, 0.5  # inches, of a group of images and above it


@part("sampling")
def sampled(
    chains: Sequence[int],
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    count: int,
    seed: int,
    event: tuple[int, ...],
    classes: int = 0,
) -> dict[int, Tensor]:
    """Images of chains of several lengths, with the classes in turn.

    Args:
        chains: numbers of steps.
        unet: the network.
        scheduler: its noise schedule.
        count: images of each chain.
        seed: of the noise.
        event: (channels, height, width).
        classes: number of classes; 0 for a model without.

    Returns:
        Images with shape (count, *event), by the number of steps.
    """
    with progress(sum(chains), f"sampling {count} images by chains of {', '.join(map(str, chains))} steps") as bar:
        return {n: sample_images(unet, scheduler, n, count, seed, event, classes, bar.update) for n in chains}


@torch.no_grad()
def sample_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    num_steps: int,
    n: int,
    seed: int,
    event_shape: tuple[int, ...] = EVENT_SHAPE,
    classes: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Float[Tensor, "n *event"]:
    """Samples of the chain that `scheduler` runs, on the CPU, with the classes in turn.

    Args:
        unet: the network.
        scheduler: its noise schedule.
        num_steps: of the chain.
        n: number of samples.
        seed: of the noise.
        event_shape: (channels, height, width).
        classes: number of classes; 0 for a model without.
        tick: is called after every step.
    """
    condition = image_classes.InTurn(classes) if classes else None
    chain = Chain(DiffusersDenoiser(unet), read_table(scheduler, num_steps), event_shape, condition=condition)
    x = chain.initial(Noise(seed), n)
    with chain.evaluating():
        for _, _, state in chain.walk(x, Noise(seed)):
            x = state[0]
            tick()
    return x.cpu()


def plot_samples(groups: dict[str, Tensor], path: Path, classes: Sequence[str] = ()) -> None:
    """Draw the first images of each group as one grid beside the others; black is -1, white is +1.

    Args:
        groups: images with shape (n, *event), by the title of their grid.
        path: of the PNG file.
        classes: names of the rows, where each row is of one class.
    """
    from implicit_diffusion.commands.shared.drawing import finish_figure, image_grid, sheet

    columns, shown = image_classes.COLUMNS, {name: x if classes else x[:96] for name, x in groups.items()}
    tall = max(-(-len(x) // columns) * (x.shape[-2] + 2) / (columns * (x.shape[-1] + 2)) for x in shown.values())
    figure = sheet(WIDTH * len(groups), WIDTH * tall + TITLE)
    for axis, (name, images) in zip(figure.subplots(1, len(groups), squeeze=False)[0], shown.items(), strict=True):
        image_grid(axis, images, low=-1, high=1, columns=columns)
        if classes:
            image_classes.name_rows(axis, classes, images.shape[-2])
        axis.set_title(name)
    finish_figure(figure, path)


@part("drawing")
def plot(data: Images, drawn: dict[int, Tensor], directory: RunDirectory) -> None:
    """figures/samples.png: held-out images, and samples by the number of steps; with classes, a row for each."""
    groups, classes = {"real": as_floats(data.held_out)} | {f"{n} steps": x for n, x in drawn.items()}, data.classes
    if data.held_out_labels is None or len(classes) > image_classes.ROWS:
        plot_samples(groups, directory.figure("samples"))
        return
    for name, images in groups.items():
        turn = image_classes.in_turn(len(classes), len(images))
        labels = data.held_out_labels if name == "real" else turn
        groups[name] = image_classes.by_class(images, labels, len(classes))
    plot_samples(groups, directory.figure("samples"), classes)
