"""How good an energy-based model of images is: likelihood beside simple models, long chains, and unlikely images.

- held-out likelihood, with log Z by annealed importance sampling, beside a Gaussian mixture and a kernel density
  estimate of scikit-learn on the same dequantised pixels, their one free number chosen on a part of the training data;
- with `--long-chains`, for images of any kind, particles after chains ten times as long as the training, which should
  still look like data;
- AUROC of −log p between held-out digits and others: the same digits with their pixels shuffled, and uniform noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.ebm.data import COPIES, GREY_LEVELS, Data
from implicit_diffusion.commands.ebm.summary import Baseline
from implicit_diffusion.extras import require
from implicit_diffusion.models.energy_model import EnergyModel
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import RunDirectory, progress
from implicit_diffusion.samplers.simulation import simulate

CHAINS = 64
COMPONENTS, BANDWIDTHS = (5, 10, 20, 40), (0.25, 0.35, 0.5, 0.7)
SHUFFLE, UNIFORM, LONG = range(3)  # streams of noise


@dataclass(frozen=True)
class DigitsJudgement:
    """Fields of `Summary` that only digits have."""

    bits_per_dimension: float
    auroc: dict[str, float]
    baselines: dict[str, Baseline]
    data_confidence: float


@dataclass(frozen=True)
class LongChains:
    """Fields of `Summary` that long chains add."""

    chain_steps: list[int]
    chain_energy: list[float]
    chain_confidence: list[float] | None


def judge_digits(model: EnergyModel, data: Data, seed: int) -> DigitsJudgement:
    """Likelihood beside simple models, and whether other images are less likely.

    Args:
        model: with its log Z.
        data: dequantised digits.
        seed: of the noise.
    """
    noise = Noise(seed).stream(100)
    dimension = math.prod(data.event_shape)
    scores = model.log_density(data.held_out)
    others = {
        "shuffled": shuffled(data.held_out, noise.generator(SHUFFLE)),
        "uniform": GREY_LEVELS * torch.rand(data.held_out.shape, generator=noise.generator(UNIFORM)),
    }
    return DigitsJudgement(
        bits_per_dimension=-scores.mean().item() / dimension / math.log(2),
        auroc={name: auroc(scores, model.log_density(x)) for name, x in others.items()},
        baselines={name: score(data) for name, score in BASELINES.items()},
        data_confidence=classifier_confidence(data.held_out),
    )


def shuffled(images: Float[Tensor, "n *event"], generator: torch.Generator) -> Float[Tensor, "n *event"]:
    """The pixels of every image in an order of its own."""
    flat = images.flatten(1)
    order = torch.rand(flat.shape, generator=generator).argsort(1)
    return flat.gather(1, order).view_as(images)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a datum from inside has the larger log-likelihood."""
    require("sklearn")
    from sklearn.metrics import roc_auc_score

    labels = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    return float(roc_auc_score(labels, torch.cat([inside, outside]).numpy()))


def _mixture(data: Data) -> Baseline:
    """Gaussians with full covariances, regularised, their number chosen on a fifth of the training data.

    It does better on grey levels than on standardised pixels.
    """
    require("sklearn")
    from sklearn.mixture import GaussianMixture

    def fit(k: int, x: np.ndarray) -> Any:
        return GaussianMixture(k, reg_covar=0.1, random_state=0, max_iter=200).fit(x)

    return _baseline(data.train, data.held_out, COMPONENTS, fit)


def _kernel_density(data: Data) -> Baseline:
    """A Gaussian around every training datum, its width chosen on a fifth of the training data.

    It does better on standardised pixels.
    """
    require("sklearn")
    from sklearn.neighbors import KernelDensity

    log_jacobian = data.scale.double().log().sum().item()
    return _baseline(
        *data.standardised(), BANDWIDTHS, lambda width, x: KernelDensity(bandwidth=width).fit(x), log_jacobian
    )


def _baseline(
    train: Float[Tensor, "m *event"],
    held_out: Float[Tensor, "l *event"],
    options: tuple[Any, ...],
    fit: Callable[[Any, np.ndarray], Any],
    log_jacobian: float = 0.0,
) -> Baseline:
    """A density with the best of its options.

    Args:
        train: to fit and to choose on.
        held_out: to judge on.
        options: values of the one free number.
        fit: (option, data) ↦ a density of scikit-learn.
        log_jacobian: of the coordinates of the data over their own units.
    """
    train = train[: len(train) // COPIES]  # one copy: copies would meet in both parts of the choice
    x, y = (part.flatten(1).double().numpy() for part in (train, held_out))
    fifth = len(x) // 5
    scores = {option: fit(option, x[fifth:]).score_samples(x[:fifth]).mean() for option in options}
    best = max(scores, key=scores.__getitem__)
    final = fit(best, x).score_samples(y)
    nll, nll_se = -float(final.mean()) + log_jacobian, float(final.std() / math.sqrt(len(final)))
    return Baseline(nll, nll_se, best, nll / math.prod(held_out.shape[1:]) / math.log(2))


BASELINES: dict[str, Callable[[Data], Baseline]] = {
    "gaussian_mixture": _mixture,
    "kernel_density": _kernel_density,
}


def long_chains(model: EnergyModel, data: Data, directory: RunDirectory, steps: int, seed: int) -> LongChains:
    """Particles moved `steps` further: figures/chains.png, their energies, and of digits what the classifier says."""
    noise = Noise(seed).stream(100, LONG)
    z = model.particles[:CHAINS]
    looks = sorted({0, steps // 100, steps // 10, steps})
    shown, energies = [(0, z)], [_energy(model, z)]
    with progress(steps, "long chains") as bar:
        for k, (state, _) in enumerate(simulate(model.moves.kernel(), model.potential, z, noise, steps), start=1):
            bar.update()
            if k in looks:
                shown.append((k, state.x))
                energies.append(_energy(model, state.x))
    _draw_chains(model, data, shown, directory)
    return LongChains(looks, energies, [confidence(model, x) for _, x in shown] if data.digits else None)


def confidence(model: EnergyModel, z: Tensor) -> float:
    """Mean of the largest class probability by the digits' classifier, for points in the model's coordinates."""
    return classifier_confidence(z * model.scale + model.shift)


@torch.no_grad()
def classifier_confidence(levels: Float[Tensor, "n 1 8 8"]) -> float:
    """The same for dequantised grey levels."""
    from implicit_diffusion.digits import load_classifier

    pixels = ((levels - 0.5) / 8 - 1).clamp(-1, 1)
    return load_classifier()(pixels).softmax(1).amax(1).mean().item()


@torch.no_grad()
def _energy(model: EnergyModel, z: Tensor) -> float:
    return model.potential(z).mean().item()


def _draw_chains(model: EnergyModel, data: Data, shown: list[tuple[int, Tensor]], directory: RunDirectory) -> None:
    from implicit_diffusion.commands.shared.drawing import finish_figure, image_grid, sheet

    figure = sheet(3 * (len(shown) + 1), 3.3)
    axes = figure.subplots(1, len(shown) + 1)
    low, high = data.train.amin().item(), data.train.amax().item()
    image_grid(axes[0], data.held_out[:64], low, high)
    axes[0].set_title("held-out data")
    for axis, (steps, z) in zip(axes[1:], shown):
        image_grid(axis, z[:64] * model.scale + model.shift, low, high)
        axis.set_title("end of training" if steps == 0 else f"{steps} steps later")
    finish_figure(figure, directory.figure("chains"))
