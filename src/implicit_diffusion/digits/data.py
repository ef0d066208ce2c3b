"""The handwritten digits of scikit-learn, as images in [-1, 1] with a fixed split.

The data are the 1797 images (8 by 8, grey values 0 to 16) of the test part of E. Alpaydin and C. Kaynak, *Optical
Recognition of Handwritten Digits*, UCI Machine Learning Repository (1998), as shipped with scikit-learn. They are
scaled to [-1, 1]. A fixed stratified split keeps 360 of them away from everything that is trained in this package.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion.extras import require
from implicit_diffusion.showing import of_tuple

EVENT_SHAPE = (1, 8, 8)
NUM_HELD_OUT = 360
SPLIT_SEED = 0


class Digits(NamedTuple):
    """The split data: images (n, 1, 8, 8), float32 in [-1, 1], and labels (n,), int64."""

    train: Float[Tensor, "train 1 8 8"]
    train_labels: Int[Tensor, " train"]
    held_out: Float[Tensor, "held_out 1 8 8"]
    held_out_labels: Int[Tensor, " held_out"]

    def __repr__(self) -> str:
        return of_tuple(self)


@cache
def load_digits() -> Digits:
    """The real digits, split once and for all, stratified by class: 1437 to train on, 360 held out."""
    require("sklearn")
    from sklearn.datasets import load_digits as load_real
    from sklearn.model_selection import train_test_split

    images, labels = load_real(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=NUM_HELD_OUT, random_state=SPLIT_SEED, stratify=labels, shuffle=True
    )
    train, held_out = (torch.tensor(x / 8.0 - 1.0, dtype=torch.float32).unflatten(1, EVENT_SHAPE) for x in split[:2])
    return Digits(train, torch.tensor(split[2]), held_out, torch.tensor(split[3]))
