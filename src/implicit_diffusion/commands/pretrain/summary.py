"""The numbers of a pretraining, summary.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from implicit_diffusion.digits import Quality


@dataclass(frozen=True)
class ImagesSummary:
    """The images.

    Args:
        train, held_out: their numbers.
        event_shape: (channels, height, width).
        left_out: files that are not among them, with reasons.
        classes: names of the classes, if the model is conditioned on them.
    """

    train: int
    held_out: int
    event_shape: tuple[int, int, int]
    left_out: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ImageQuality:
    """The numbers of a set of samples, and of real images beside them.

    Args:
        samples: their number.
        mmd: squared MMD of samples and held-out images.
        mmd_of_halves: its mean between random halves of real images, and `mmd_of_halves_std` its deviation.
        memorised: share of the samples nearer to a training image than the 1 % quantile of held-out images.
        nearest, nearest_held_out: mean distances of samples, and of held-out images, to the nearest training image.
        as_asked: share of the samples that neighbours give the class that was asked for; None without classes.
        held_out_as_labelled: share of the held-out images that neighbours give their own class.
    """

    samples: int
    mmd: float
    mmd_of_halves: float
    mmd_of_halves_std: float
    memorised: float
    nearest: float
    nearest_held_out: float
    as_asked: float | None
    held_out_as_labelled: float | None


@dataclass(frozen=True)
class Summary:
    """The headline numbers.

    Args:
        config: the options, resolved.
        images: what was trained on.
        parameters: of the network.
        loss_train, loss_held_out: the denoising loss on images that were trained on, and on others.
        seconds, updates: of the training; fewer updates than steps where its minutes were over.
        quality: of the samples by the number of steps of their chains; of digits alone.
        image_quality: the same of other images, where samples were asked for.
        classifier_accuracy, judge_accuracy: of the classifiers that judge the digits, on held-out ones.
    """

    config: dict[str, Any]
    images: ImagesSummary
    parameters: int
    loss_train: float
    loss_held_out: float
    seconds: float
    updates: int
    quality: dict[str, Quality] | None = None
    classifier_accuracy: float | None = None
    judge_accuracy: float | None = None
    image_quality: dict[str, ImageQuality] | None = None
