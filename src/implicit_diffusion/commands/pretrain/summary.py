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
class Summary:
    """The headline numbers.

    Args:
        config: the options, resolved.
        images: what was trained on.
        parameters: of the network.
        loss_train, loss_held_out: the denoising loss on images that were trained on, and on others.
        seconds, updates: of the training; fewer updates than steps where its minutes were over.
        quality: of the samples by the number of steps of their chains; of digits alone.
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
