"""Pictures of an energy-based model: on the plane its density, energy and particles; for images particles and data."""

from __future__ import annotations

from typing import Any

import torch

from implicit_diffusion.experiments.drawing import finish, sheet, tile
from implicit_diffusion.experiments.ebm_data import Data
from implicit_diffusion.experiments.energy_model import EnergyModel
from implicit_diffusion.experiments.planar import Quadrature
from implicit_diffusion.runs import RunDirectory

COLOURS = {"weighted": "#2a9d5c", "hmc": "#7fb069", "implicit": "#1f6f8b", "cd": "#c1666b", "pcd": "#e8a33d"}
NAMES = {
    "weighted": "weighted",
    "hmc": "the same, without weights",
    "implicit": "implicit (one Langevin step)",
    "cd": "CD-5",
    "pcd": "PCD-5",
}


def draw(model: EnergyModel, data: Data, summary: dict[str, Any], directory: RunDirectory) -> None:
    """figures/density.png and figures/training.png where there is a plane, figures/particles.png for images."""
    if len(data.event_shape) == 3:
        _draw_images(model, data, directory)
    elif data.event_shape == (2,):
        _draw_plane(model, data, directory)
    points = [p for p in directory.read_metrics() if "exact_kl" in p]
    if points:
        _draw_training(points, summary, directory)


def _draw_training(points: list[dict[str, Any]], summary: dict[str, Any], directory: RunDirectory) -> None:
    figure = sheet(9, 3.4)
    axes = figure.subplots(1, 2)
    updates = [p["updates"] for p in points]
    axes[0].plot(updates, [p["exact_kl"] for p in points], color=COLOURS["weighted"], marker=".")
    axes[0].set(xlabel="updates", ylabel="exact KL(data‖model), nats", yscale="log")
    axes[1].plot(updates, [p["exact_log_z"] for p in points], color="0.2", label="exact", lw=1.5)
    if "log_z" in points[0]:
        told = [p["log_z"] for p in points]
        axes[1].plot(updates, told, color=COLOURS["weighted"], ls="--", label="training's own weights")
    end = {"yerr": [2 * summary["log_z_estimate_se"]], "fmt": "o", "ms": 4, "color": COLOURS["cd"]}
    axes[1].errorbar(updates[-1:], [summary["log_z_estimate"]], **end, label="annealing, ± 2 s.e.")
    axes[1].set(xlabel="updates", ylabel="log Z")
    axes[1].legend(frameon=False)
    finish(figure, directory.figure("training"), axes)


def _draw_plane(model: EnergyModel, data: Data, directory: RunDirectory) -> None:
    half = min(4.0, 1.2 * data.standardised()[0].abs().amax().item())  # in deviations: each coordinate has its own
    quadrature = Quadrature(torch.zeros(2), torch.ones(2), half=half, cell=2 * half / 240)
    log_q = quadrature.log_density(model.potential)[0] - model.scale.double().log().sum()
    x_low, y_low = (model.shift - half * model.scale).tolist()
    x_high, y_high = (model.shift + half * model.scale).tolist()
    side, extent = len(quadrature.axis), (x_low, x_high, y_low, y_high)
    aspect = "equal" if model.scale.amax() < 3 * model.scale.amin() else "auto"  # units differ

    def image(values: torch.Tensor) -> Any:
        return values.reshape(side, side).mT.numpy()

    panels = 4 if data.law is not None else 3
    figure = sheet(3.3 * panels, 3.7)
    axes = figure.subplots(1, panels, sharex=True, sharey=True)
    shown = {"origin": "lower", "extent": extent, "cmap": "magma", "aspect": aspect}
    density = log_q.exp()
    if data.law is not None:
        density_of_data = data.law.log_density(quadrature.grid * model.scale + model.shift).exp()
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
    held, particles = data.held_out[:1000], (model.particles * model.scale + model.shift)[:1000]
    axes[-1].scatter(*held.T, s=3, color="0.7", lw=0, label="held-out data")
    axes[-1].scatter(*particles.T, s=3, color=COLOURS["weighted"], lw=0, label="particles")
    axes[-1].set_title("particles")
    axes[-1].legend(frameon=False, fontsize=8, markerscale=3, loc="upper right")
    for axis in axes:
        axis.set(aspect=aspect, xlim=extent[:2], ylim=extent[2:], xlabel="$x_1$")
    axes[0].set_ylabel("$x_2$")
    finish(figure, directory.figure("density"))


def _draw_images(model: EnergyModel, data: Data, directory: RunDirectory) -> None:
    figure = sheet(8, 4.2)
    axes = figure.subplots(1, 2)
    low, high = data.train.amin().item(), data.train.amax().item()
    particles = model.particles * model.scale + model.shift
    for axis, images, title in zip(axes, (data.held_out, particles), ("held-out data", "particles")):
        tile(axis, images[:64], low, high)
        axis.set_title(title)
    finish(figure, directory.figure("particles"))


def draw_comparison(name: str, curves: dict[str, list[list[dict[str, Any]]]], directory: RunDirectory) -> None:
    """figures/comparison.png: exact KL against pulls and seconds, and log Z against exact, with bands over seeds."""
    figure = sheet(12.5, 3.6)
    axes = figure.subplots(1, 3)
    for arm, runs in curves.items():
        whole = [run for run in runs if len(run) == max(map(len, runs))]
        if not whole:
            continue
        kl = torch.tensor([[p["kl"] for p in run] for run in whole])
        for axis, key in zip(axes, ("gradient_evaluations", "seconds")):
            x = torch.tensor([[float(p[key]) for p in run] for run in whole]).mean(0)
            axis.plot(x, kl.log().mean(0).exp(), color=COLOURS[arm], marker=".", label=NAMES[arm])
            axis.fill_between(x, kl.amin(0), kl.amax(0), color=COLOURS[arm], alpha=0.15, lw=0)
    for axis, label in zip(axes, ("pulls through V at all particles", "seconds")):
        axis.set(xlabel=label, ylabel="exact KL(data‖model), nats", yscale="log")
    axes[0].set_title(f"{name}: geometric means and ranges over seeds", fontsize=10)
    if any(curves.values()):
        axes[0].legend(frameon=False, fontsize=8)
    whole = [run for run in curves.get("weighted", []) if run]
    if whole:
        difference = torch.tensor([[p["log_z_particles"] - p["log_z"] for p in run] for run in whole])
        updates = [p["updates"] for p in whole[0]]
        axes[2].axhline(0, color="0.5", lw=1)
        axes[2].plot(updates, difference.mean(0), color=COLOURS["weighted"], label="training's own weights")
        axes[2].fill_between(
            updates, difference.amin(0), difference.amax(0), color=COLOURS["weighted"], alpha=0.15, lw=0
        )
        ends = [(p["log_z_estimate"] - p["log_z"], 2 * p["log_z_estimate_se"]) for p in (run[-1] for run in whole)]
        places = updates[-1] * (1.02 + 0.015 * torch.arange(len(ends)))
        axes[2].errorbar(
            places,
            [d for d, _ in ends],
            yerr=[e for _, e in ends],
            fmt=".",
            color=COLOURS["cd"],
            label="annealing, ± 2 s.e.",
        )
        axes[2].set(xlabel="updates", ylabel="estimate of log Z − exact")
        axes[2].legend(frameon=False, fontsize=8)
    finish(figure, directory.figure("comparison"), axes)
