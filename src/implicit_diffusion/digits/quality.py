r"""How much a set of samples looks like the real digits.

The distance between samples and digits is the squared maximum mean discrepancy with the kernel
k(x, y) = exp(-|x - y|^2 / 2 l^2), l the median distance between real digits (Gretton et al., *A Kernel Two-Sample
Test*, JMLR 2012, eq. 3, the U-statistic):

    MMD^2(X, Y) = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

It is unbiased, hence about zero (of either sign) between two halves of the real data; `Quality.mmd_reference` says how
far from zero it is there by chance. A sample counts as *memorised* if it is nearer to a training digit than 99 % of the
held-out digits are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.digits.classifiers import fit_judge, load_classifier
from implicit_diffusion.digits.data import EVENT_SHAPE, SPLIT_SEED, load_digits
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives import MMD, gaussian_kernel
from implicit_diffusion.particles import Particles


class _Reference(NamedTuple):
    """What real digits score, and the scales that are fixed on them."""

    bandwidth: float  # median distance of the real digits
    mmd_mean: float  # of MMD^2 between two random halves of the real digits
    mmd_quantile: float  # its 95 % quantile
    nearest: Tensor  # distance of each held-out digit to the training set, shape (360,)


@cache
def _reference(splits: int = 400) -> _Reference:
    """Computed once per process, over random splits of the real digits into halves."""
    digits = load_digits()
    real = torch.cat([digits.train, digits.held_out]).flatten(1).double()
    distance = torch.cdist(real, real)
    bandwidth = distance[tuple(torch.triu_indices(len(real), len(real), 1))].median().item()
    kernel = (-0.5 * (distance / bandwidth) ** 2).exp()
    mmd = mmd_of_halves(kernel, splits, torch.Generator().manual_seed(SPLIT_SEED))
    nearest = nearest_distance(digits.held_out)
    return _Reference(bandwidth, mmd.mean().item(), mmd.quantile(0.95).item(), nearest)


def squared_mmd(x: Float[Tensor, "n 1 8 8"], y: Float[Tensor, "m 1 8 8"]) -> float:
    """Squared maximum mean discrepancy, U-statistic (module docstring); the kernel's width is fixed on real digits."""
    x, y = (images.detach().flatten(1).double().cpu() for images in (x, y))
    return MMD(y, gaussian_kernel(_reference().bandwidth)).value(Particles(x)).item()


def mmd_of_halves(kernel: Float[Tensor, "m m"], splits: int, generator: torch.Generator) -> Float[Tensor, " splits"]:
    """MMD^2 between random halves of a set, from the kernel of all its pairs, whose diagonal is one.

    Column s of `first` marks a half in split s; all splits share one product with the kernel matrix.
    """
    m = len(kernel)
    order = torch.stack([torch.randperm(m, generator=generator) for _ in range(splits)], dim=1)
    first = (order < m // 2).to(kernel)
    other, n = 1 - first, m // 2
    within = [((half * (kernel @ half)).sum(0) - k) / (k * (k - 1)) for half, k in ((first, n), (other, m - n))]
    return within[0] + within[1] - 2 * (first * (kernel @ other)).sum(0) / (n * (m - n))


def nearest_distance(x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, " n"]:
    """Euclidean distance of each image to the nearest training digit, shape (n,), float64."""
    train = load_digits().train.flatten(1).double()
    exact = "donot_use_mm_for_euclid_dist"  # |x|² + |y|² − 2xy leaves 1e−8 of the distance of a copy, which is 0
    return torch.cdist(x.detach().flatten(1).double().cpu(), train, compute_mode=exact).min(dim=1).values


@dataclass(frozen=True)
class Appearance:
    """The numbers of a set of images that need no second set.

    Args:
        classifier_confidence, judge_confidence: mean of the largest class probability.
        judge_agreement: share of the images to which both classifiers give the same class.
        memorised: share of the images nearer to a training digit than the 1 % quantile of the held-out digits.
        nearest_distance: mean distance to the nearest training digit.
    """

    classifier_confidence: float
    judge_confidence: float
    judge_agreement: float
    memorised: float
    nearest_distance: float


@dataclass(frozen=True)
class MMDBetweenHalves:
    """The squared MMD between two random halves of the real digits, over many splits: its mean and 95 % quantile."""

    mean: float
    quantile_95: float


@dataclass(frozen=True)
class Quality(Appearance):
    """How much a set of samples looks like the real digits; each number is given for real digits too.

    Args:
        class_histogram: share of the samples in each of the ten classes, by the network.
        mmd: squared MMD to the held-out digits.
        mmd_reference: the same between halves of the real digits.
        held_out: the appearance of the held-out digits.
    """

    class_histogram: list[float]
    mmd: float
    mmd_reference: MMDBetweenHalves
    held_out: Appearance


@torch.no_grad()
def judge_samples(samples: Float[Tensor, "n 1 8 8"]) -> Quality:
    """The quality of a set of samples.

    Args:
        samples: images with shape (n, 1, 8, 8), n at least 2, nominally in [-1, 1]; they are not clipped here.

    Raises:
        InvalidInputError: another shape, fewer than two samples, or a value that is not finite.
    """
    if tuple(samples.shape[1:]) != EVENT_SHAPE or len(samples) < 2:
        raise InvalidInputError(f"samples: got shape {tuple(samples.shape)}; it must be (n, 1, 8, 8) with n >= 2")
    if not samples.isfinite().all():
        raise InvalidInputError("samples: some values are not finite; look at the sampler before judging its samples")
    samples = samples.float().cpu()
    held_out = load_digits().held_out
    reference = _reference()
    classes = load_classifier()(samples).softmax(1).argmax(1)
    return Quality(
        **vars(_appearance(samples, reference.nearest)),
        class_histogram=[(classes == digit).double().mean().item() for digit in range(10)],
        mmd=squared_mmd(samples, held_out),
        mmd_reference=MMDBetweenHalves(reference.mmd_mean, reference.mmd_quantile),
        held_out=_appearance(held_out, reference.nearest),
    )


def _appearance(x: Float[Tensor, "n 1 8 8"], nearest_of_held_out: Float[Tensor, " held_out"]) -> Appearance:
    by_network, by_judge = load_classifier()(x).softmax(1), fit_judge()(x)
    nearest = nearest_distance(x)
    return Appearance(
        classifier_confidence=by_network.amax(1).double().mean().item(),
        judge_confidence=by_judge.amax(1).mean().item(),
        judge_agreement=(by_network.argmax(1) == by_judge.argmax(1)).double().mean().item(),
        memorised=(nearest < nearest_of_held_out.quantile(0.01)).double().mean().item(),
        nearest_distance=nearest.mean().item(),
    )
