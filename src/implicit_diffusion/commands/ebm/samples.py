"""Data beside draws of an energy-based model, column by column and in pairs, and how far apart they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.shared.drawing import WEIGHTED, sheet
from implicit_diffusion.extras import require
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import Shown

DATA, MODEL, TRAIN = "0.55", WEIGHTED, "#7a5195"  # colours
PAIRED = 8  # columns, up to which all pairs are shown
MOST_COLUMNS = 12  # whose marginals or numbers are shown
COMPONENTS = 4  # principal components that are shown
ENOUGH = 500  # held-out data, from which on they are shown without the training data
MOST = 2000  # data or draws that are looked at
SHUFFLES, QUANTILE = 200, 0.95


@dataclass(frozen=True, repr=False)
class Sides(Shown):
    """Data and draws of the model, side by side in the data's units.

    Args:
        data, draws: with shape (n, d) and (m, d).
        names: of the columns.
        words: which data these are.
    """

    data: Float[Tensor, "n d"]
    draws: Float[Tensor, "m d"]
    names: tuple[str, ...]
    words: str


def sides(model: EnergyModel, data: Data) -> Sides:
    """Held-out data, or all data where few are held out, beside the particles of the model."""
    enough = len(data.held_out) >= ENOUGH
    x = data.held_out if enough else torch.cat([data.once, data.held_out])
    y = model.particles * model.scale + model.shift
    words = "held-out data" if enough else "data (of the training, and held out)"
    return Sides(x[:MOST].flatten(1).double(), y[:MOST].flatten(1).double(), data.names, words)


def distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Wasserstein-1 distance ∫|F − G| of every column, and the 95 % quantile of it over shuffles of the two samples.

    Both in deviations of x. The second is how far apart two samples of one law are by chance.
    """
    deviation = x.std(0)
    pooled, order = torch.cat([x, y]).div(deviation).sort(0)
    gaps = pooled.diff(dim=0)
    of_x = torch.arange(len(x) + len(y)) < len(x)

    def apart(is_x: Tensor) -> Tensor:
        step = torch.where(is_x, 1 / len(x), -1 / len(y)).double()
        return (step.cumsum(0)[:-1].abs() * gaps).sum(0)

    generator = Noise(0).generator()
    shuffled = [apart(of_x[torch.randperm(len(of_x), generator=generator)][:, None]) for _ in range(SHUFFLES)]
    return apart(of_x[order]), torch.stack(shuffled).quantile(QUANTILE, 0)


def most_different(shown: Sides) -> list[int]:
    """The columns whose distance exceeds that of chance the most, in that order, at most `MOST_COLUMNS`."""
    apart, by_chance = distances(shown.data, shown.draws)
    return (apart - by_chance).argsort(descending=True)[:MOST_COLUMNS].tolist()


def principal(shown: Sides, scale: Float[Tensor, " d"]) -> Sides:
    """Both in the first principal components of the data over `scale`, each turned so that its sum is positive."""
    x, y = ((part - shown.data.mean(0)) / scale for part in (shown.data, shown.draws))
    _, values, directions = torch.linalg.svd(x, full_matrices=False)
    share = values.square() / values.square().sum()
    directions = directions * directions.sum(1, keepdim=True).sign()
    axes = directions[:COMPONENTS].mT
    names = tuple(f"component {i + 1} ({share[i]:.0%})" for i in range(axes.shape[1]))
    return Sides(x @ axes, y @ axes, names, shown.words)


def draw_pairs(shown: Sides) -> Any:
    """Marginals on the diagonal, pairs of the data below it and of the model above it, on the same axes."""
    d = shown.data.shape[1]
    figure = sheet(1.0 + 1.75 * d, 0.6 + 1.75 * d)
    panels = figure.subplots(d, d, squeeze=False)
    limits = [_limits(shown.data[:, i], shown.draws[:, i]) for i in range(d)]
    for i in range(d):
        for j in range(d):
            axes = panels[i, j]
            axes.set_xlim(*limits[j])
            if i == j:
                _marginal(axes, shown.data[:, i], shown.draws[:, i], limits[i])
            else:
                x, colour = (shown.data, DATA) if i > j else (shown.draws, MODEL)
                axes.scatter(x[:, j].numpy(), x[:, i].numpy(), s=4, lw=0, color=colour, alpha=0.6)
                axes.set_ylim(*limits[i])
                r = round(torch.corrcoef(x[:, [i, j]].mT)[0, 1].item(), 2) + 0.0  # no −0.00
                axes.set_title(f"r = {r:.2f}".replace("-", "−"), fontsize=8, color="0.35", pad=2, loc="right")
            axes.tick_params(labelsize=8, labelleft=j == 0 and i > 0, labelbottom=i == d - 1)
            if j == 0 and i > 0:
                axes.set_ylabel(axis_label(shown.names[i]), fontsize=9)
            if i == d - 1:
                axes.set_xlabel(axis_label(shown.names[j]), fontsize=9)
    panels[0, 0].set_ylabel(f"{axis_label(shown.names[0])}\n(density)", fontsize=9)
    _legend(figure, shown)
    return figure


def draw_marginals(shown: Sides, chosen: list[int]) -> Any:
    """Marginals of the chosen columns."""
    width = min(4, len(chosen))
    rows = -(-len(chosen) // width)
    figure = sheet(0.6 + 2.9 * width if width > 1 else 5.5, 0.6 + 2.2 * rows if width > 1 else 3.6)
    panels = figure.subplots(rows, width, squeeze=False).flatten()
    for axes, i in zip(panels, chosen):
        _marginal(axes, shown.data[:, i], shown.draws[:, i], _limits(shown.data[:, i], shown.draws[:, i]))
        axes.set_xlabel(axis_label(shown.names[i]), fontsize=9)
        axes.tick_params(labelsize=8, labelleft=False)
    for axes in panels[::width]:
        axes.set_ylabel("density", fontsize=9)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    _legend(figure, shown)
    return figure


def draw_scores(held_out: Tensor, train: Tensor, draws: Tensor) -> Any:
    """Histograms of the log-likelihood of held-out data, training data and draws of the model, with their means."""
    figure = sheet(10, 3.2)
    axes = figure.subplots()
    together = torch.cat([part[:MOST] for part in (held_out, train, draws)])
    low, high = torch.quantile(together, torch.tensor([0.005, 1.0], dtype=together.dtype)).tolist()
    bins = np.linspace(low, high + 1e-9, 2 + min(30, math.isqrt(4 * len(held_out)))).tolist()
    for values, colour, label in ((train, TRAIN, "training"), (held_out, DATA, "held out"), (draws, MODEL, "model")):
        mean, error = values.mean().item(), values.std().item() / math.sqrt(len(values))
        axes.axvspan(mean - 2 * error, mean + 2 * error, color=colour, alpha=0.15, lw=0)
        axes.hist(values.clamp(min=low).numpy(), bins, density=True, histtype="step", color=colour, lw=1.5, label=label)
        axes.axvline(mean, color=colour, lw=1.2, ls=(0, (4, 3)))
    axes.set(xlabel="log-likelihood (nats per datum)", ylabel="density")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def axis_label(name: str, most: int = 24) -> str:
    """A name that fits below an axis; matplotlib reads it as a formula only if it is one of `Data.names`."""
    if name.startswith("$x_"):
        return name
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def _limits(x: Float[Tensor, " n"], y: Float[Tensor, " m"]) -> tuple[float, float]:
    """Limits of an axis: they hold all of x, and what of y is not far out."""
    low, high = x.amin().item(), x.amax().item()
    near = y[(y > low - (high - low)) & (y < high + (high - low))]
    both = torch.cat([x, near])
    margin = 0.05 * (both.amax() - both.amin()).item()
    return both.amin().item() - margin, both.amax().item() + margin


def _marginal(axes: Any, x: Tensor, y: Tensor, limits: tuple[float, float]) -> None:
    """Histograms of data, with two standard errors, and of the model."""
    bins = torch.linspace(*limits, 25, dtype=torch.float64)
    width, middle = (bins[1] - bins[0]).item(), (bins[:-1] + bins[1:]) / 2
    counts = torch.histogram(x, bins)[0]
    height = counts / len(x) / width
    error = 2 * (counts * (1 - counts / len(x))).sqrt() / len(x) / width
    axes.bar(
        middle.numpy(), height.numpy(), width, color="0.85", yerr=error.numpy(), error_kw={"ecolor": DATA, "lw": 0.9}
    )
    axes.stairs((torch.histogram(y, bins)[0] / len(y) / width).numpy(), bins.numpy(), color=MODEL, lw=1.6)
    axes.set(xlim=limits, ylim=(0, None), yticks=[])


def _legend(figure: Any, shown: Sides) -> None:
    require("matplotlib")
    from matplotlib.patches import Patch

    handles = [Patch(color=DATA, label=shown.words), Patch(color=MODEL, label="model")]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=10)
