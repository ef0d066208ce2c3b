"""Pictures for trackers: a grid of images, or points of the plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.shared.drawing import WEIGHTED, sheet, tiled
from implicit_diffusion.extras import require
from implicit_diffusion.runs.trackers.tracking import Pixels

PICTURED = 16  # images in a grid
COLUMNS = 4
SIDE = 400  # pixels, at least, of a picture: trackers show small ones blurred
PLOTTED = 1000  # points in a picture
FRAMES = 4  # of a video, side by side
PLANE = (2,)  # shape of a point of the plane


def filmstrips(images: Float[Tensor, "n C ..."]) -> Float[Tensor, "n C H W"]:
    """Images as they are; of videos (n, C, frames, H, W) a few frames, evenly spaced, side by side."""
    if images.ndim != 5:
        return images
    count = min(FRAMES, images.shape[2])
    chosen = torch.linspace(0, images.shape[2] - 1, count, device=images.device).round().long()
    return images[:, :, chosen].transpose(2, 3).flatten(3)


def displayed(x: Float[Tensor, "n ..."], decoder: Callable[[Tensor], Tensor] | None) -> Float[Tensor, "n ..."]:
    """Samples as pictures show them: decoded where they are latents, with frames of a video side by side."""
    return x if decoder is None else filmstrips(decoder(x))


def image_pixels(images: Float[Tensor, "n C H W"], low: float | int, high: float | int) -> Pixels:
    """The images in a grid, each pixel of a small image as a square of pixels; `low` is black, `high` white."""
    picture = tiled(images, low, high, COLUMNS)
    times = -(-SIDE // max(picture.shape[:2]))
    large = picture.repeat_interleave(times, 0).repeat_interleave(times, 1)
    return np.round(255 * large.numpy()).astype(np.uint8)


def plane_pixels(
    points: Float[Tensor, "n 2"],
    weights: Float[Tensor, " n"] | None = None,
    *,
    beside: Float[Tensor, "m 2"],
    words: str = "data",
    points_are: str = "particles",
    names: Sequence[str] = ("$x_1$", "$x_2$"),
) -> Pixels:
    """Points over others, on axes that the others set, so that pictures of one run can be compared.

    Args:
        points: of the model.
        weights: of the points, which their areas show; None for equal ones.
        beside: data, or points of another law.
        words: what the others are.
        points_are: what the points are.
        names: of the two coordinates, as labels of axes.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = sheet(4.2, 4.2)
    axes = figure.subplots()
    low, high = beside.amin(0), beside.amax(0)
    margin = 0.15 * (high - low)
    x, y = beside[:PLOTTED].T.numpy()
    axes.scatter(x, y, s=4, color="0.75", lw=0, label=words)
    label = points_are if weights is None else f"{points_are}, areas: weights"
    sizes: Any = np.full(len(points), 6.0) if weights is None else 6 * len(points) * weights.detach().cpu().numpy()
    x, y = points[:PLOTTED].T.numpy()
    axes.scatter(x, y, s=sizes[:PLOTTED], color=WEIGHTED, alpha=0.7, lw=0, label=label)
    limits = [(a - m, b + m) for a, b, m in zip(low.tolist(), high.tolist(), margin.tolist())]
    axes.set(xlim=limits[0], ylim=limits[1], xlabel=names[0], ylabel=names[1])
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
