"""The pictures of an energy-based model: its density, its draws beside the data, its training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from implicit_diffusion.commands.ebm.curves import draw_curves
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.ebm.samples import (
    MOST,
    PAIRED,
    axis_label,
    draw_marginals,
    draw_pairs,
    draw_scores,
    most_different,
    principal,
    sides,
)
from implicit_diffusion.commands.ebm.summary import Summary
from implicit_diffusion.commands.shared.drawing import WEIGHTED, finish_figure, image_grid, sheet
from implicit_diffusion.commands.shared.page import Picture
from implicit_diffusion.evaluation.quadrature import Quadrature
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.runs import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(model: EnergyModel, data: Data, summary: Summary, directory: RunDirectory) -> list[Picture]:
    """Draw into figures/ what the data and the model allow.

    Returns:
        The pictures in the order of the report: the density on the plane; images beside images; marginals and pairs of
        columns, or of principal components where columns are many; log-likelihoods; how training went.
    """
    pictures: list[Picture] = []

    def keep(name: str, figure: Figure | None, title: str, caption: str, gridded: Any = ()) -> None:
        path = directory.figure(name)
        if figure is not None:
            finish_figure(figure, path, gridded)
        pictures.append(Picture(name, path, title, caption))

    images, d = len(data.event_shape) == 3, math.prod(data.event_shape)
    shown = sides(model, data)
    axes = f"Grey are {shown.words}, at most {MOST} of them, with two standard errors; green are the model's particles."
    if images:
        keep("particles", _draw_images(model, data), "Data and draws of the model", IMAGES)
    elif d == 2:
        keep("density", _draw_plane(model, data), "Density, energy and particles", PLANE)
    elif d <= PAIRED and d > 1:
        keep("pairs", draw_pairs(shown), "Columns in pairs", f"{axes} {PAIRS}")
    else:
        chosen = most_different(shown)
        most = f"The {len(chosen)} of {d} columns that differ most from the data" if d > 1 else "Data and model"
        figure = draw_marginals(shown, chosen)
        if d == 1 and model.log_z is not None:
            low, high = figure.axes[0].get_xlim()
            x = torch.linspace(low, high, 400)
            figure.axes[0].plot(x, model.log_density(x[:, None].to(data.train)).exp(), color="0.2", lw=1)
        keep("marginals", figure, most, f"{axes} {MARGINALS if d > 1 else LINE}")
    if d > PAIRED:
        components = draw_pairs(principal(shown, data.scale.double().expand(data.event_shape).flatten()))
        keep("components", components, "Principal components in pairs", f"{axes} {COMPONENTS} {PAIRS}")
    if summary.chain_steps is not None and directory.figure("chains").exists():
        keep("chains", None, "Long chains", CHAINS)
    if model.log_z is not None:
        draws = model.particles * model.scale + model.shift
        figure = draw_scores(*(model.log_density(x) + data.log_cell for x in (data.held_out, data.once[:MOST], draws)))
        keep("scores", figure, "Log-likelihoods, one by one", SCORES, figure.axes)
    curves = draw_curves(directory.read_metrics(), summary, data, len(model.particles))
    if curves is not None:
        keep("training", curves, "How training went", CURVES, curves.axes)
    return pictures


IMAGES = "Left images that training did not see, right the particles: draws of the model. The two should look the same."
PLANE = (
    "The model's density, and its energy −log p above the minimum; where the law of the data is known, its density has "
    "the same colours. On the right grey are held-out data, green the particles."
)
PAIRS = (
    "Below the diagonal are data, above it the model, on the same axes: the two should mirror each other. r is the "
    "correlation."
)
LINE = "The line is the model's density."
MARGINALS = (
    "Columns are ordered by how far their Wasserstein-1 distance exceeds that of two samples of one law by chance."
)
COMPONENTS = "The directions in which the data, in deviations, vary most."
CHAINS = "The same particles, moved on by the sampler long after training: they should still look like data."
SCORES = (
    "Dashed are the means, with two standard errors. Training right of held out means that data were "
    "memorised; the model right of held out, that it is narrower than the data; left of it, that it has mass where "
    "there are no data."
)
CURVES = (
    "Training's own numbers come from its particles. A band or bar is two standard errors; dotted lines are the limits "
    "beyond which there is advice. What is known exactly, or by annealing after the training, is marked."
)


def _draw_plane(model: EnergyModel, data: Data) -> Figure:
    half = min(4.0, 1.2 * data.standardised()[0].abs().amax().item())  # in deviations: each coordinate has its own
    quadrature = Quadrature(torch.zeros(2), torch.ones(2), half=half, cell=2 * half / 240)
    log_q = quadrature.log_density(model.potential)[0] - model.scale.double().log().sum()
    x_low, y_low = (model.shift - half * model.scale).tolist()
    x_high, y_high = (model.shift + half * model.scale).tolist()
    side, extent = len(quadrature.grid.axis), (x_low, x_high, y_low, y_high)
    aspect = "equal" if model.scale.amax() < 3 * model.scale.amin() else "auto"  # units differ

    def image(values: torch.Tensor) -> Any:
        return values.reshape(side, side).mT.numpy()

    panels = 4 if data.law is not None else 3
    figure = sheet(3.3 * panels, 3.7)
    axes = figure.subplots(1, panels, sharex=True, sharey=True)
    shown = {"origin": "lower", "extent": extent, "cmap": "magma", "aspect": aspect}
    density = log_q.exp()
    if data.law is not None:
        density_of_data = data.law.log_density(quadrature.grid.points * model.scale + model.shift).exp()
        top = density_of_data.max().item()
        axes[0].imshow(image(density_of_data), vmin=0, vmax=top, **shown)
        axes[0].set_title("data's density")
    else:
        top = density.max().item()
    axes[-3].imshow(image(density), vmin=0, vmax=top, **shown)
    axes[-3].set_title("model's density")
    energy = -log_q + log_q.max()
    contours = axes[-2].imshow(image(energy.clamp(max=12)), **shown | {"cmap": "viridis_r"})
    axes[-2].set_title("energy above its minimum")
    figure.colorbar(contours, ax=axes[-2], shrink=0.75, label="nats")
    held_out, particles = data.held_out[:1000], (model.particles * model.scale + model.shift)[:1000]
    axes[-1].scatter(*held_out.T, s=3, color="0.7", lw=0, label="held-out data")
    axes[-1].scatter(*particles.T, s=3, color=WEIGHTED, lw=0, label="particles")
    axes[-1].set_title("particles")
    axes[-1].legend(frameon=False, fontsize=8, markerscale=3, loc="upper right")
    for axis in axes:
        axis.set(aspect=aspect, xlim=extent[:2], ylim=extent[2:], xlabel=axis_label(data.names[0]))
    axes[0].set_ylabel(axis_label(data.names[1]))
    return figure


def _draw_images(model: EnergyModel, data: Data) -> Figure:
    figure = sheet(8, 4.2)
    axes = figure.subplots(1, 2)
    low, high = data.train.amin().item(), data.train.amax().item()
    particles = model.particles * model.scale + model.shift
    for axis, images, title in zip(axes, (data.held_out, particles), ("held-out data", "particles")):
        image_grid(axis, images[:64], low, high)
        axis.set_title(title)
    return figure
