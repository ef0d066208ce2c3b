"""What all pictures share: figures without a window or global state, quiet axes, colours, images side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from implicit_diffusion.extras import require
from implicit_diffusion.files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHTED, UNWEIGHTED = "#2a9d5c", "#1f6f8b"  # colours of weighted and of plain particles
LONGEST = 26  # letters of a name in a legend
INK, FAINT = "#22272e", "#d9dde2"  # colours of text and of grounds
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ab",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e9ecef",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": "#5b626c",
    "ytick.color": "#5b626c",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.dpi": 200,
}


def sheet(width: float | int, height: float | int) -> Figure:
    """An empty figure of that size in inches."""
    require("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def finish_figure(figure: Figure, path: Path, gridded: Iterable[Any] = ()) -> None:
    """Write the figure as PNG; `gridded` axes get a faint grid and no frame, and titles begin where their axes do."""
    for axis in figure.axes:
        if axis.get_title():
            _title_left(axis)
    for axis in gridded:
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path, dpi=130)


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write the figure in one step, in the format that the suffix of `path` names."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), **options)


def legend_above(axis: Any, columns: int) -> None:
    """A legend of `columns` columns between title and axes, where it can hide nothing; the title moves up for it."""
    style = {"borderaxespad": 0.0, "borderpad": 0.3, "columnspacing": 1.0, "handlelength": 1.5, "labelspacing": 0.3}
    legend = axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, **style)
    labels = legend.get_texts()
    _title_left(axis, pad=6 + 1.55 * labels[0].get_fontsize() * -(-len(labels) // columns))


def _title_left(axis: Any, **options: Any) -> None:
    """Let the title begin where the axes do, as all titles of a page."""
    title = axis.get_title() or axis.get_title("left")
    if title:
        size = axis.title.get_fontsize()
        axis.set_title("", loc="center")
        axis.set_title(title, loc="left", fontsize=size, **options)


def in_legend(name: str) -> str:
    """A name for a legend: short, one line, and never a formula or hidden, as matplotlib reads `$…$` and `_…`."""
    words = " ".join("".join(c if c.isprintable() else "\ufffd" for c in name).split())
    short = words if len(words) <= LONGEST else f"{words[: LONGEST // 2]}…{words[-LONGEST // 2 + 1 :]}"
    return ("\N{HAIR SPACE}" if short.startswith("_") else "") + short.replace("$", r"\$")


def image_grid(
    axis: Any, images: Float[Tensor, "n C H W"], low: float | int, high: float | int, columns: int = 8
) -> None:
    """Show images in rows with a grey line around each, grey, RGB, or the mean of other channels; `low` is black."""
    axis.imshow(tiled(images, low, high, columns).numpy(), vmin=0, vmax=1)
    axis.set_axis_off()


def tiled(
    images: Float[Tensor, "n C H W"], low: float | int, high: float | int, columns: int
) -> Float[Tensor, "rows_H columns_W 3"]:
    """The picture that `image_grid` shows, with numbers from 0 to 1."""
    shown = ((images.float().cpu() - low) / (high - low)).clamp(0, 1)
    shown = shown if shown.shape[1] in (1, 3) else shown.mean(1, keepdim=True)
    framed = pad(pad(shown, (1, 1, 1, 1), value=0.3), (0, 0, 0, 0, 0, 0, 0, -len(shown) % columns), value=0.3)
    picture = framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return picture.expand(-1, -1, 3)


def smooth(values: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a window of 2·radius + 1, cut off at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
