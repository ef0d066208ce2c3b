"""Two classifiers of the digits that look at samples, and a reward that one of them gives.

The small convolutional network is differentiable, so it can serve as a reward; a model that is optimised against it
may learn to fool it. The *judge* is a support vector machine, another kind of classifier, and nothing is ever optimised
against it: samples on which the network is sure and the judge is not have hacked the reward.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.digits.data import NUM_HELD_OUT, load_digits
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require

ASSETS = Path(__file__).with_name("assets")


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
    """Train the network on the training digits by AdamW with cosine decay; the held-out digits are not used.

    Weight initialisation and dropout use the global generator, which is seeded inside a fork: the caller's random state
    is afterwards as it was before, and the result is the same bit for bit on the same machine.

    Args:
        steps: optimizer steps.
        batch: images per step.
        lr: learning rate at the start.
        weight_decay: of AdamW.
        seed: of all random numbers.

    Returns:
        The network in eval mode, frozen.
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
    require("sklearn")
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
