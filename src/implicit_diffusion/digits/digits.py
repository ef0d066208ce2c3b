r"""The handwritten digits of scikit-learn, two classifiers of them, and how good a set of samples is.

The data are the 1797 images (8 by 8, grey values 0..16) of the test part of E. Alpaydin and C. Kaynak, *Optical
Recognition of Handwritten Digits*, UCI Machine Learning Repository (1998), as shipped with scikit-learn; we scale
them to [-1, 1]. A fixed stratified split keeps 360 of them away from everything that is trained here.

Two classifiers look at samples. The small convolutional network is differentiable, so it can serve as a reward;
whatever is optimised against it may learn to fool it. The *judge* is a support vector machine of another kind and is
never optimised against: samples on which the network is sure and the judge is not have hacked the reward.

`quality` compares samples with the digits. Its distance is the squared maximum mean discrepancy with the kernel
k(x, y) = exp(-|x - y|^2 / 2 l^2), l the median distance of the real digits (Gretton et al., *A Kernel Two-Sample Test*,
JMLR 2012, eq. 3, the U-statistic):

    MMD^2(X, Y) = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

It is unbiased, hence about zero (of either sign) between two halves of the real data; `mmd_reference` says how far
from zero chance takes it there. A sample counts as *memorised* if it lies nearer to a training digit than 99 % of the
held-out digits do.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from implicit_diffusion.showing import of_tuple

from ..errors import InvalidInputError

EVENT_SHAPE = (1, 8, 8)
NUM_HELD_OUT = 360
SPLIT_SEED = 0
ASSETS = Path(__file__).with_name("assets")


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
    from sklearn.datasets import load_digits as load_real
    from sklearn.model_selection import train_test_split

    images, labels = load_real(return_X_y=True)
    split = train_test_split(
        images, labels, test_size=NUM_HELD_OUT, random_state=SPLIT_SEED, stratify=labels, shuffle=True
    )
    train, held_out = (torch.tensor(x / 8.0 - 1.0, dtype=torch.float32).unflatten(1, EVENT_SHAPE) for x in split[:2])
    return Digits(train, torch.tensor(split[2]), held_out, torch.tensor(split[3]))


# ---------------------------------------------------------------------------------------------- the two classifiers


class DigitClassifier(nn.Module):
    """A small smooth convolutional network: digits (n, 1, 8, 8) to logits (n, 10). SiLU, so that gradients exist."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(16 * width, 10),
        )

    def forward(self, x: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 10"]:
        """Logits with shape (batch, 10)."""
        logits: Tensor = self.layers(x)
        return logits


def train_classifier(
    steps: int = 2000, batch: int = 128, lr: float = 2e-3, weight_decay: float = 0.05, seed: int = 0
) -> DigitClassifier:
    """Train the network on the training digits by AdamW with cosine decay; the held-out digits are not looked at.

    Weight initialisation and dropout know no explicit generator, so the global one is seeded inside a fork: the
    caller's random state is as before afterwards, and the result is the same bit for bit on the same machine.
    """
    digits = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(digits.train), (batch,))
            loss = nn.functional.cross_entropy(model(digits.train[rows]), digits.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: Callable[[Tensor], Tensor]) -> float:
    """Share of the held-out digits whose largest logit (or probability) is at their label."""
    digits = load_digits()
    return (classifier(digits.held_out).argmax(1) == digits.held_out_labels).double().mean().item()


def save_classifier(model: DigitClassifier, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` (width, held-out accuracy, size of the held-out set) to a folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"width": model.width, "held_out_accuracy": accuracy(model), "held_out_digits": NUM_HELD_OUT}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_classifier(folder: Path = ASSETS / "digits_classifier") -> DigitClassifier:
    """The shipped network, in eval mode and frozen: digits (n, 1, 8, 8) to logits (n, 10).

    Raises:
        InvalidInputError: the folder holds no classifier.
    """
    from safetensors.torch import load_file

    if not (folder / "config.json").is_file():
        raise InvalidInputError(f"folder: {folder} holds no config.json; save_classifier writes such a folder")
    model = DigitClassifier(json.loads((folder / "config.json").read_text())["width"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


@cache
def fit_judge() -> Callable[[Tensor], Tensor]:
    """The judge: an RBF support vector machine with sigmoid calibration, fitted to the training digits in a second.

    Returns:
        A function from digits (n, 1, 8, 8) to class probabilities (n, 10), float64, without gradient.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    digits = load_digits()
    judge = CalibratedClassifierCV(SVC(C=10.0, gamma="scale"), method="sigmoid", ensemble=False)
    judge.fit(digits.train.flatten(1).numpy(), digits.train_labels.numpy())

    def probabilities(x: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 10"]:
        return torch.tensor(judge.predict_proba(x.detach().flatten(1).float().cpu().numpy()), dtype=torch.float64)

    return probabilities


def digit_log_probability(digit: int) -> Callable[[Tensor], Tensor]:
    """Reward: log-probability, in nats, that the shipped network gives to one class.

    Args:
        digit: the class, 0 to 9.

    Returns:
        A differentiable function from digits (n, 1, 8, 8) of any floating dtype and device to rewards (n,).

    Raises:
        InvalidInputError: `digit` is not in 0..9.
    """
    if digit not in range(10):
        raise InvalidInputError(f"digit: got {digit!r}; it must be one of 0, 1, ..., 9")
    classifier = load_classifier()

    def reward(x: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, " batch"]:
        log_probabilities: Tensor = classifier.to(x).forward(x).log_softmax(dim=1)
        return log_probabilities[:, digit]

    return reward


# ------------------------------------------------------------------------------------------------------- the quality


class _Reference(NamedTuple):
    """What real digits score, and the scales that were fixed on them."""

    bandwidth: float  # median distance of the real digits
    mmd_mean: float  # of MMD^2 between two random halves of the real digits
    mmd_quantile: float  # its 95 % quantile
    nearest: Tensor  # distance of each held-out digit to the training set, shape (360,)


@cache
def _reference(splits: int = 400) -> _Reference:
    digits = load_digits()
    real = torch.cat([digits.train, digits.held_out]).flatten(1).double()
    distance = torch.cdist(real, real)
    bandwidth = distance[tuple(torch.triu_indices(len(real), len(real), 1))].median().item()
    kernel = (-0.5 * (distance / bandwidth) ** 2).exp()
    # Column s of `inside` marks the first half in split s; all splits share one product with the kernel matrix.
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.stack([torch.randperm(len(real), generator=generator) for _ in range(splits)], dim=1)
    inside = (order < len(real) // 2).double()
    first, second = inside.sum(0), (1 - inside).sum(0)
    within_first = (inside * (kernel @ inside)).sum(0)
    within_second = ((1 - inside) * (kernel @ (1 - inside))).sum(0)
    between = (inside * (kernel @ (1 - inside))).sum(0)
    mmd = (
        (within_first - first) / (first * (first - 1))  # the diagonal, k(x, x) = 1, is taken out
        + (within_second - second) / (second * (second - 1))
        - 2 * between / (first * second)
    )
    nearest = nearest_distance(digits.held_out)
    return _Reference(bandwidth, mmd.mean().item(), mmd.quantile(0.95).item(), nearest)


def squared_mmd(x: Float[Tensor, "n 1 8 8"], y: Float[Tensor, "m 1 8 8"]) -> float:
    """Squared maximum mean discrepancy, U-statistic (module docstring); the kernel's width is fixed on real digits."""

    def kernel_sum(u: Tensor, v: Tensor) -> Tensor:
        distance = torch.cdist(u.detach().flatten(1).double().cpu(), v.detach().flatten(1).double().cpu())
        return (-0.5 * (distance / _reference().bandwidth) ** 2).exp().sum()

    n, m = len(x), len(y)
    mmd = (kernel_sum(x, x) - n) / (n * (n - 1)) + (kernel_sum(y, y) - m) / (m * (m - 1))
    return (mmd - 2 * kernel_sum(x, y) / (n * m)).item()


def nearest_distance(x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, " n"]:
    """Euclidean distance of each image to the nearest training digit, shape (n,), float64."""
    train = load_digits().train.flatten(1).double()
    exact = "donot_use_mm_for_euclid_dist"  # |x|² + |y|² − 2xy leaves 1e−8 of the distance of a copy, which is 0
    return torch.cdist(x.detach().flatten(1).double().cpu(), train, compute_mode=exact).min(dim=1).values


@torch.no_grad()
def quality(samples: Float[Tensor, "n 1 8 8"]) -> dict[str, Any]:
    """How much a set of samples looks like the real digits; every number stands beside that of real digits.

    Args:
        samples: images with shape (n, 1, 8, 8), n at least 2, nominally in [-1, 1] and not clipped here.

    Returns:
        A dict of floats, and lists and dicts of floats, ready for JSON:
        `classifier_confidence`, `judge_confidence`: mean of the largest class probability;
        `judge_agreement`: share of samples to which both give the same class;
        `class_histogram`: ten shares, by the network;
        `mmd`: squared MMD to the held-out digits, and `mmd_reference`: {"mean", "quantile_95"} between random halves
        of the real digits;
        `memorised`: share of samples nearer to a training digit than the 1 % quantile of the held-out digits;
        `nearest_distance`: mean distance to the nearest training digit;
        `held_out`: the same confidences, agreement, `memorised` and `nearest_distance` of the held-out digits.

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
    looks, classes = _looks(samples, reference.nearest)
    return {
        **looks,
        "class_histogram": [(classes == digit).double().mean().item() for digit in range(10)],
        "mmd": squared_mmd(samples, held_out),
        "mmd_reference": {"mean": reference.mmd_mean, "quantile_95": reference.mmd_quantile},
        "held_out": _looks(held_out, reference.nearest)[0],
    }


def _looks(x: Tensor, reference_nearest: Tensor) -> tuple[dict[str, float], Tensor]:
    """The numbers that need no second sample, and the network's classes."""
    by_network, by_judge = load_classifier()(x).softmax(1), fit_judge()(x)
    nearest = nearest_distance(x)
    numbers = {
        "classifier_confidence": by_network.amax(1).double().mean().item(),
        "judge_confidence": by_judge.amax(1).mean().item(),
        "judge_agreement": (by_network.argmax(1) == by_judge.argmax(1)).double().mean().item(),
        "memorised": (nearest < reference_nearest.quantile(0.01)).double().mean().item(),
        "nearest_distance": nearest.mean().item(),
    }
    return numbers, by_network.argmax(1)
